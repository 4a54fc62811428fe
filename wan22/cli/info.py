"""`wan22 info` and `wan22 models`: what a file, a folder or a known name is."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

from ..checks import cut, shown
from ..presets import PRESETS, Preset, release_of
from .loading import preset_of
from .options import Output
from .reporting import aligned, print_lines

LICENCE = "Apache-2.0"
# Entries of a list, and characters of a text, that a table shows; --json prints all.
MOST_SHOWN, LONGEST = 200, 4000


def describe(name: str, revision: str | None, output: Output) -> None:
    """Print the recipe in a video, or what a checkpoint is."""
    from ..video.writers import WRITERS

    path, as_json = Path(name).expanduser(), output.as_json
    if not path.exists() and (preset := preset_of(name, "t2v")) is not None:
        _print(_facts(preset), as_json)
    elif not path.exists():
        _print(repository(name, revision), as_json)
    elif path.suffix.lower() in WRITERS:
        from ..video.metadata import read_recipe

        recipe = read_recipe(path).to_dict()
        _print(recipe if as_json else {**recipe.pop("call"), **recipe}, as_json)
    else:
        _print(lora(path) or checkpoint(path), as_json)


def lora(path: Path) -> dict[str, Any] | None:
    """Return what a LoRA's file holds and says of its training; None for anything else."""
    from ..checkpoints.files.safetensors import read_header
    from ..checkpoints.lora.spellings import DELTAS, read_key

    if not path.is_file() or path.suffix != ".safetensors":
        return None
    entries, metadata = read_header(path)
    spelled = {key: found for key in entries if (found := read_key(key)).part is not None}
    # A quantised model's files have keys that end in "alpha", too.
    if not any(found.part != "alpha" and found.part not in DELTAS for found in spelled.values()):
        return None
    ranks = {entries[key]["shape"][0] for key, found in spelled.items() if found.part == "lora_A"}
    trained = {
        name: text for name, text in sorted(metadata.items()) if name.startswith(("modelspec.", "ss_"))
    }
    return {
        "path": str(path),
        "kind": "LoRA",
        "experts": sorted({found.expert for found in spelled.values() if found.expert is not None}) or None,
        "layers": len({(found.expert, found.module) for found in spelled.values()}),
        "ranks": sorted(ranks),
        "size": f"{path.stat().st_size / 1e6:.3g} MB",
        "training": trained,
        "loads with": f'pipe.load_lora_weights("{path}"), or as one of the pair high=, low=',
    }


def checkpoint(path: Path) -> dict[str, Any]:
    """Return what a file, a model's folder or a repository in any layout holds, told from its tensors."""
    from ..checkpoints.converting.source import read_source

    source = read_source(path)
    models = {slot: _model(content) for slot, content in source.models.items()}
    transformers = [c for slot, c in source.models.items() if slot.startswith("transformer")]
    found: dict[str, Any] = {"path": str(path), "layout": _layout(path, source)}
    if transformers:
        whole = source.whole and not path.is_file()
        experts = 2 if whole and len(transformers) == 2 else 1
        preset = release_of(transformers[0].settings, experts)
        # One file may be either expert's, or an only transformer's: its tensors do not say.
        found["variant"] = preset.name if whole else f"a transformer like {preset.name}'s"
        found["experts"] = experts if whole else "one of one or two"
    found["models"] = models
    found["size"] = f"{sum(model['bytes'] for model in models.values()) / 1e9:.3g} GB"
    found["loads with"] = _loader(path, source, transformers)
    return found


def repository(name: str, revision: str | None) -> dict[str, Any]:
    """Return what a repository holds, told from its configurations, which alone are downloaded."""
    from ..checkpoints.files.hub import is_repository_name
    from ..pipelines.loading.checkpoint import Wanted
    from ..pipelines.loading.official_layout import OfficialLayout
    from ..pipelines.loading.preparing import bytes_to_download
    from .downloading import locate

    if not is_repository_name(name):
        raise FileNotFoundError(f"there is no file or folder {name}, and no checkpoint that is known by it")
    found = locate(name, revision)
    models = found.outline(Wanted())
    transformers = [model for slot, model in models.items() if slot.startswith("transformer")]
    size = bytes_to_download(name, found.downloads, {} if revision is None else {"revision": revision})
    return {
        "repository": name,
        "layout": "official" if isinstance(found, OfficialLayout) else "Diffusers",
        "kind": found.kind,
        "variant": release_of(transformers[0].config, len(transformers)).name if transformers else None,
        "experts": len(transformers),
        "models": {slot: {"parameters": _parameters(model)} for slot, model in models.items()},
        "to download": None if size is None else f"{size / 1e9:.3g} GB",
    }


def _parameters(model: Any) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e9:.3g} billion"


def list_models(output: Output) -> None:
    """Print the checkpoints that are known by name."""
    facts = [_facts(preset) for preset in PRESETS]
    if output.as_json:
        print(json.dumps(facts))
        return
    columns = ("name", "task", "weights", "video", "steps", "repository", "licence")
    heads = ("name", "task", "weights in bf16", "video", "steps", "repository", "licence")
    print_lines(aligned([heads, *([str(fact[column]) for column in columns] for fact in facts)]))


def _facts(preset: Preset) -> dict[str, Any]:
    tasks = {16: "text", 36: "image", 48: "text or image"}
    return {
        "name": preset.name,
        "task": "first and last image" if preset.two_frames else tasks[preset.in_channels],
        "transformers": 1 if preset.boundary_ratio is None else 2,
        "weights": f"{preset.gigabytes:g} GB",
        "video": f"{preset.width}x{preset.height}, {preset.num_frames} frames at {preset.fps} fps",
        "steps": preset.num_inference_steps,
        "repository": preset.repo or "inside wan22",
        "licence": LICENCE,
    }


def _model(content: Any) -> dict[str, Any]:
    sizes = content.sizes
    return {
        "kind": content.kind,
        "tensors": len(content.official_names),
        "bytes": sum(sizes.values()),
        "dtypes": {dtype: f"{size / 1e9:.3g} GB" for dtype, size in sizes.most_common()},
    }


def _layout(path: Path, source: Any) -> str:
    if source.whole and path.is_file():
        return "several models in one file"
    if source.whole:
        return "official" if source.index is None else "Diffusers"
    return "GGUF" if path.suffix == ".gguf" else "one model's weights"


def _loader(path: Path, source: Any, transformers: list[Any]) -> str:
    """Return the Python that loads it."""
    if source.whole and transformers:
        pipelines = {16: "WanT2VPipeline", 36: "WanI2VPipeline"}
        both = "WanT2VPipeline and WanI2VPipeline"
        name = pipelines.get(transformers[0].settings["in_channels"], both)
        constructor = "from_single_file" if path.is_file() else "from_pretrained"
        return f'{name}.{constructor}("{path}")'
    kind = next(iter(source.models))
    named = "" if kind == "transformer" else f"{kind}="
    pipeline = f'WanT2VPipeline.from_single_file({named}"{path}", …)'
    cls = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}.get(kind)
    return f'{cls}.from_single_file("{path}"), or {pipeline}' if cls else pipeline


def _print(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values))  # in ASCII: a terminal finds nothing to obey
        return
    empty: tuple[Any, ...] = (None, (), ("",), (None,), {})
    kept = {name: value for name, value in values.items() if value not in empty}
    print_lines(aligned((cut(name).replace("_", " "), _text(value)) for name, value in kept.items()))


def _text(value: Any, inner: bool = False) -> str:
    """Return a value in words, an entry a line, what is inside of an entry on its line; much is cut short."""
    if isinstance(value, tuple | list) and inner:
        return shown(value)
    if isinstance(value, dict):
        some = [(cut(name), _text(entry, True)) for name, entry in islice(value.items(), MOST_SHOWN)]
        lines = [f"{name}{'' if inner else ':'} {entry}" for name, entry in some]
    elif isinstance(value, tuple | list):
        lines = [_text(entry, True) for entry in islice(value, MOST_SHOWN)]
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
        return (
            text if len(text) <= LONGEST else f"{text[:LONGEST]} … and {len(text) - LONGEST} characters more"
        )
    if len(value) > MOST_SHOWN:
        lines.append(f"… and {len(value) - MOST_SHOWN} more")
    return (", " if inner else "\n").join(lines)
