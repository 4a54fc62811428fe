"""Load and set up the pipeline that the options of a command describe."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..accel.parallel.environment import launched
from ..checks import parse_bytes, shown
from ..presets import PRESETS, Preset
from .options import Loading, Output, flags_of
from .signatures import PIPELINES

if TYPE_CHECKING:
    from ..pipelines.i2v import WanI2VPipeline
    from ..pipelines.t2v import WanT2VPipeline

    Pipeline = WanT2VPipeline | WanI2VPipeline

# Options for the other models of a pipeline whose --model is a file, and their components; the first may be
# left out.
PARTS = {"low": "transformer_2", "vae": "vae", "text_encoder": "text_encoder", "tokenizer": "tokenizer"}
BESIDE_A_FILE = tuple(PARTS)


def load(
    task: str,
    options: Loading,
    output: Output,
    loras: Sequence[Mapping[str, Any]] = (),
    dtypes: Mapping[str, str] | None = None,
) -> "Pipeline":
    """Load a pipeline and set it up; under torchrun the ranks share its work.

    `task` is a key of PIPELINES; `loras`, arguments of load_lora_weights, are beside those of the options;
    `dtypes` are names by component, unless the options name one.
    """
    import wan22

    from ..progress import loading_bars

    layout, device = parse_layout(options.parallel), find_device(options.device)
    arguments: dict[str, Any] = {
        "memory": parse_memory(options.memory),
        "quantize": options.quantize,
        "parallel": layout,
        "loras": [*lora_arguments(options), *loras],
        "dtype": dtype_of(options, dtypes),
        "prepare": options.prepare,
    }
    cls: type[Pipeline] = getattr(wan22, PIPELINES[task])
    source = find_model(options.model, task)
    with loading_bars(output.draws_bars):
        if Path(source).is_file():
            pipe = cls.from_single_file(source, **_parts(options), **arguments)
        else:
            pipe = cls.from_pretrained(source, **hub_options(options), **arguments)
        if not output.draws_bars:
            pipe.set_progress_bar_config(disable=True)
        if layout is None and options.memory is None and device != "cpu":
            pipe.to(device)
        if options.tiling:
            pipe.vae.enable_tiling()
        if options.accelerate:
            pipe.accelerate()
        if options.attention_backend is not None:
            pipe.set_attention_backend(options.attention_backend)
        if options.compile:
            pipe.compile()
    return pipe


def check_source(options: Loading, source: str | Path) -> None:
    """Refuse options that do not go with a file, a folder or a repository, or files that are not given."""
    from ..pipelines.loading.single_files import with_parts_of

    parts, hub = _parts(options), hub_options(options)
    if not Path(source).is_file():
        if parts:
            raise ValueError(f"{flags_of(next(iter(parts)))[0]} goes with a --model that is a file")
        return
    if hub:
        raise ValueError(f"--revision {options.revision} is for repositories; {source} is a file")
    inside = with_parts_of(Path(source), {}, BESIDE_A_FILE)
    missing = [name for name in BESIDE_A_FILE[1:] if name not in parts and name not in inside]
    if missing:
        flags = ", ".join(flags_of(name)[0] for name in missing)
        raise ValueError(f"{source} is one file; {flags} must be given, too")


def _parts(options: Loading) -> dict[str, Any]:
    """Return the files beside that of --model."""
    return {name: part for name in BESIDE_A_FILE if (part := getattr(options, name)) is not None}


def hub_options(options: Loading) -> dict[str, Any]:
    """Return the options of a repository's download."""
    return {} if options.revision is None else {"revision": options.revision}


def parse_memory(text: str | None) -> str | None:
    """Return the GPU memory that `--memory` names; a number without a unit is of gigabytes."""
    if text is None or text == "auto":
        return text
    amount = f"{text}GB" if re.fullmatch(r"\d{1,4}(\.\d+)?", text) else text
    parse_bytes(amount, "memory")
    return amount


def quantization_of(options: Loading) -> Any:
    """Return the settings that `--quantize` names; None if it is not given."""
    if options.quantize is None:
        return None
    from ..accel.quantization.settings import Quantization

    return Quantization.of(options.quantize)


def find_model(model: str | None, task: str) -> str | Path:
    """Return the path or repository that `--model` stands for; by default, the task's miniature."""
    from ..assets import tiny_checkpoint

    if model is None:
        return tiny_checkpoint(task)
    path = Path(model).expanduser()
    if path.exists():
        return path
    names = {preset.name.lower(): preset for preset in PRESETS}
    if (preset := names.get(model.lower())) is not None:
        return preset.repo or tiny_checkpoint(preset.name.removeprefix("tiny-"))
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return model
    near = difflib.get_close_matches(model.lower(), names, 1, 0.4) or list(names)[:1]
    raise ValueError(
        f"there is no file or folder {model}, and no checkpoint of that name; say {names[near[0]].name}, or "
        "see `wan22 models`"
    )


def preset_of(model: str | Path | None, task: str) -> Preset | None:
    """Return the release that a name or a repository, in either layout, is of; None for anything else."""
    if model is None:
        return next(preset for preset in PRESETS if preset.name == f"tiny-{task}")
    name = str(model).lower().removesuffix("-diffusers")
    for preset in PRESETS:
        repository = preset.repo.lower().removesuffix("-diffusers")
        if name == preset.name.lower() or (repository and name == repository):
            return preset
    return None


def find_device(name: str | None) -> str:
    """Return the device that `--device` names, by default the best there is; a rank has one of its own."""
    import torch

    from ..accel.parallel import processes

    best = str(processes.own_device())
    if launched() and name is not None:
        raise ValueError(f"--device {name}: each rank has a device of its own; leave it out")
    if best == "cpu" and torch.backends.mps.is_available() and not launched():
        best = "mps"
    try:
        torch.empty(1, device=name or best)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {name} is not there; {best} is") from error
    return name or best


def dtype_of(options: Loading, recorded: Mapping[str, str] | None) -> Any:
    """Return the constructors' dtype."""
    import torch

    if options.dtype is None and recorded is not None:
        return {component: _recorded_dtype(name) for component, name in recorded.items()}
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "stored": None}
    dtype = names[options.dtype or _default_dtype(options)]
    # The VAE is the one part where half precision is seen; it stays as it is stored, or better.
    return dtype if dtype in (None, torch.float32) else {"default": dtype, "vae": torch.float32}


def _default_dtype(options: Loading) -> str:
    """Return the dtype where none is asked for: on a GPU that of the official script."""
    if find_device(options.device) != "cpu" or options.memory not in (None, "auto"):  # an amount is a GPU's
        return "bf16"
    # On a CPU, the miniature is as fast in float32, and exact.
    return "fp32" if options.model is None and options.prepare is None else "stored"


def _recorded_dtype(name: str) -> Any:
    """Return the dtype that a recipe names."""
    import torch

    dtype = getattr(torch, name, None) if name.isidentifier() and name[0] != "_" else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"the recipe's dtype is {shown(name)}, which is none of torch; give --dtype bf16")
    return dtype


def split_strength(text: str) -> tuple[str, float]:
    """Split "file=0.8" into the LoRA and its strength."""
    found = re.fullmatch(r"(.+)=([-+]?\d*\.?\d+)", text)
    if found is None or Path(text).expanduser().exists():
        return text, 1.0
    return found[1], float(found[2])


def lora_arguments(options: Loading) -> Iterator[dict[str, Any]]:
    """Yield the arguments of load_lora_weights for each LoRA of the options."""
    for text in options.lora or ():
        name, strength = split_strength(text)
        yield {"pretrained_model_name_or_path_or_dict": name, "strength": strength}
    pair = {"high": options.lora_high, "low": options.lora_low}
    if given := {slot: lora for slot, lora in pair.items() if lora is not None}:
        yield given


def parse_layout(text: str | None) -> dict[str, Any] | None:
    """Return parallelize's arguments for `--parallel`; None for a process of its own."""
    if not launched():
        if text is None:
            return None
        start = "torchrun --nproc-per-node=2 -m wan22.cli …"
        raise ValueError(f"--parallel {text} is for several ranks: {start}")
    kinds = {"cfg": int, "ulysses": int, "ring": int, "fsdp": bool, "vae": bool}
    try:
        pairs = [part.split("=") for part in text.split(",")] if text not in (None, "auto") else []
        layout = {name: json.loads(value) for name, value in pairs}
    except ValueError:
        layout = {"": None}
    if any(type(value) is not kinds.get(name) for name, value in layout.items()):
        raise ValueError(
            f'--parallel {text} must be "auto", or some of cfg=2,ulysses=4,ring=2,fsdp=true,vae=false'
        )
    return layout
