"""Load and set up the pipeline that the options of a command describe."""

import difflib
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..accel.parallel.environment import launched
from ..checks import shown
from ..presets import PRESETS
from .options import Loading, flags_of
from .reporting import say
from .signatures import PIPELINES

if TYPE_CHECKING:
    from ..pipelines.i2v import WanI2VPipeline
    from ..pipelines.t2v import WanT2VPipeline

    Pipeline = WanT2VPipeline | WanI2VPipeline

# Options for the other models of a pipeline whose --model is a file; the first may be left out.
BESIDE_A_FILE = ("low", "vae", "text_encoder", "tokenizer")


def load(
    task: str,
    options: Loading,
    quiet: bool,
    loras: Sequence[Mapping[str, Any]] = (),
    dtypes: Mapping[str, str] | None = None,
) -> "Pipeline":
    """Load a pipeline and set it up; under torchrun the ranks share its work.

    `task` is a key of PIPELINES; `loras`, arguments of load_lora_weights, are beside those of the options;
    `dtypes` are names by component, unless the options name one.
    """
    import wan22

    if options.model is None:
        say(f"no --model given: this is tiny-{task}, the miniature inside wan22, of coloured shapes", quiet)
    if quiet:
        _silence_loading()
    layout, device = parse_layout(options.parallel), find_device(options.device)
    arguments: dict[str, Any] = {
        "memory": options.memory,
        "quantize": options.quantize,
        "parallel": layout,
        "loras": [*_loras(options), *loras],
        "dtype": _dtype(options, device, dtypes),
        "prepare": options.prepare,
    }
    cls: type[Pipeline] = getattr(wan22, PIPELINES[task])
    source = find_model(options.model, task)
    parts = {name: part for name in BESIDE_A_FILE if (part := getattr(options, name)) is not None}
    hub: dict[str, Any] = {} if options.revision is None else {"revision": options.revision}
    if not Path(source).is_file():
        if parts:
            raise ValueError(f"{flags_of(next(iter(parts)))[0]} goes with a --model that is a file")
        pipe = cls.from_pretrained(source, **hub, **arguments)
    elif hub:
        raise ValueError(f"--revision {options.revision} is for repositories; {source} is a file")
    elif missing := [flags_of(name)[0] for name in _absent(source, parts)]:
        raise ValueError(f"{source} is one file; {', '.join(missing)} must be given, too")
    else:
        pipe = cls.from_single_file(source, **parts, **arguments)
    if quiet:
        pipe.set_progress_bar_config(disable=True)
    if layout is None and options.memory is None and device != "cpu":
        pipe.to(device)
    if options.tiling:
        pipe.vae.enable_tiling()
    if options.accelerate:
        pipe.accelerate()
    if options.attention is not None:
        pipe.set_attention_backend(options.attention)
    if options.compile:
        pipe.compile()
    return pipe


def _absent(source: str | Path, parts: Collection[str]) -> list[str]:
    """Return what neither the options nor the file of the transformer give."""
    from ..pipelines.loading.single_files import with_parts_of

    inside = with_parts_of(Path(source), {}, BESIDE_A_FILE)
    return [name for name in BESIDE_A_FILE[1:] if name not in parts and name not in inside]


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


def _dtype(options: Loading, device: str, recorded: Mapping[str, str] | None) -> Any:
    """Return the constructors' dtype."""
    import torch

    if options.dtype is None and recorded is not None:
        return {component: _recorded_dtype(name) for component, name in recorded.items()}
    if options.dtype is None:  # on a CPU, the miniature is as fast in float32, and exact
        exact = options.model is None and device == "cpu" and options.prepare is None
        return torch.float32 if exact else None
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "stored": None}
    dtype = names[options.dtype]
    # The VAE is the one part where half precision is seen; it stays as it is stored, or better.
    return dtype if dtype in (None, torch.float32) else {"default": dtype, "vae": torch.float32}


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


def _loras(options: Loading) -> Iterator[dict[str, Any]]:
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


def _silence_loading() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for module in (diffusers_logging, transformers_logging):
        module.disable_progress_bar()
    logging.getLogger("wan22.pipelines.loading.preparing").setLevel(logging.ERROR)
