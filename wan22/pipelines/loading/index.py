"""model_index.json of the Diffusers layout: which classes its components may be of, and its settings."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ...checkpoints.files.weights import read_json
from ...checkpoints.naming.schemas import INDEX
from ...checks import shown
from ...private_apis import signature_keys

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_TRANSFORMER = ("diffusers", ("WanTransformer3DModel",))
# The library and the classes of each component. What a file names is imported and called.
_CLASSES = {
    "transformer": _TRANSFORMER,
    "transformer_2": _TRANSFORMER,
    "vae": ("diffusers", ("AutoencoderKLWan",)),
    "text_encoder": ("transformers", ("UMT5EncoderModel",)),
    "image_encoder": ("transformers", ("CLIPVisionModel", "CLIPVisionModelWithProjection")),
    "image_processor": (
        "transformers",
        ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
    ),
}
# Of these, any class that derives from one.
_BASES = {
    "scheduler": ("diffusers", "SchedulerMixin", "FlowMatchEulerDiscreteScheduler"),
    "tokenizer": ("transformers", "PreTrainedTokenizerBase", "T5TokenizerFast"),
}
COMPONENTS = (*_CLASSES, *_BASES)
_EXPERTS = ("transformer", "transformer_2")
_NEEDED = ("vae", "text_encoder", "tokenizer", "scheduler")


def is_component(entry: Any) -> bool:
    """Whether an entry names a component that is there."""
    return isinstance(entry, list | tuple) and len(entry) == 2 and entry[0] is not None


def check_index(path: Path) -> None:
    """Refuse a model_index.json that cannot be read, names no components, or has settings of another kind."""
    refuse_mark(path)
    index = read_json(path)
    if not any(is_component(entry) for entry in index.values()):
        raise ValueError(f"{path} names no components, such as transformer; it is not that of a pipeline")
    for name in COMPONENTS:
        entry = index.get(name, [None, None])
        parts = entry if isinstance(entry, list) else [entry]
        if len(parts) != 2 or not (all(isinstance(p, str) for p in parts) or parts == [None, None]):
            rule = "it must be the library and the class, such as"
            raise ValueError(f"{path}: {name} is {shown(entry)}; {rule} {_example(name)}, or two of null")
    if not isinstance(index.get("_class_name"), str):
        kind = shown(index.get("_class_name"))
        raise ValueError(f"{path}: _class_name is {kind}; it must be a pipeline's, such as 'WanPipeline'")
    INDEX.check(str(path), index)


def check_classes(
    path: Path, index: Mapping[str, Any], pipeline: type[DiffusionPipeline], given: Mapping[str, Any]
) -> None:
    """Refuse components of other classes than a pipeline's, or that are not listed; not those given."""
    listed = [
        name for name in _EXPERTS if is_component(index.get(name)) and given.get(name, name) is not None
    ]
    boundary = given.get("boundary_ratio", index.get("boundary_ratio"))
    if len(listed) == 2 and boundary is None:
        rule = "boundary_ratio must say where the second takes over; give boundary_ratio=, such as 0.875"
        raise ValueError(f"{path} lists two transformers, and {rule}")
    alone = listed == ["transformer_2"] and boundary == 1  # the only expert's are all steps
    for name in signature_keys(pipeline)[0]:
        if name in given:
            continue
        needed = name in _NEEDED or (name == "transformer" and not alone)
        if needed and not is_component(index.get(name)):
            raise ValueError(f"{path} lists no {name}; give {name}=, or None to leave it out")
        entry: Any = index.get(name)
        if is_component(entry) and not _is_known(name, *entry):
            rule = f"it must be {_example(name)}, or be given as {name}="
            raise ValueError(f"{path}: {name} is {shown(list(entry))}; {rule}")


def refuse_mark(path: Path) -> None:
    """Refuse a byte-order mark where diffusers or transformers read the file, which cannot."""
    with path.open("rb") as file:
        if file.read(3) == _BYTE_ORDER_MARK:
            raise ValueError(f"{path} begins with a byte-order mark; save it as UTF-8 without one")


def _is_known(name: str, library: str, class_name: str) -> bool:
    if name in _CLASSES:
        known, names = _CLASSES[name]
        return library == known and class_name in names
    known, base, _ = _BASES[name]
    if library != known:
        return False
    module = import_module(known)
    try:
        found = getattr(module, class_name)
    except (AttributeError, ImportError, RuntimeError):  # of a library that is missing or does not know it
        return False
    return isinstance(found, type) and issubclass(found, getattr(module, base))


def _example(name: str) -> str:
    library, names = _CLASSES[name] if name in _CLASSES else (_BASES[name][0], _BASES[name][2:])
    return " or ".join(f"{library}.{class_name}" for class_name in names)
