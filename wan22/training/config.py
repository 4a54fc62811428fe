"""The settings of a training, in Python, in TOML and as flags; checked before anything is loaded."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..checks import check_choice, check_positive_int, check_real, cut, parse_bytes, refuse_unknown, shown
from .toml import parse_toml

Method = Literal["lora", "dora", "loha", "lokr", "full"]
Experts = Literal["both", "high", "low"]
Sampling = Literal["shift", "logit-normal", "uniform"]
Weighting = Literal["none", "bell"]
Schedule = Literal["constant", "cosine", "linear"]
Optimizer = Literal["adamw", "adamw8bit"]
# Names of layers, by what they belong to: see `targets`.
TARGETS = {
    "all": r"attn[12]\.(to_[qkv]|to_out\.0|add_[kv]_proj)|ffn\.net\.(0\.proj|2)",
    "attention": r"attn[12]\.(to_[qkv]|to_out\.0|add_[kv]_proj)",
    "self-attention": r"attn1\.(to_[qkv]|to_out\.0)",
    "feed-forward": r"ffn\.net\.(0\.proj|2)",
}
# What may differ from the run that is resumed: it does not change what has been trained so far.
FREE = frozenset(
    {
        *("output", "name", "save_every", "keep", "validate_every", "sample_every", "sample_prompts"),
        *("tracker", "checkpointing", "diffusers_names", "memory", "device"),
    }
)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training.

    Args:
        model: checkpoint to train for: a folder or repository.
        data: folder that `wan22 cache` wrote.
        output: folder for LoRAs, states, samples and logs.
        name: beginning of the LoRAs' file names.
        expert: which transformers: both in turn, or the high-noise or low-noise one; with one transformer,
            both is that one.
        method: what is trained: lora, dora, loha or lokr; or full, all weights, for small models.
        rank: of the matrices, 1 or more.
        alpha: their product is multiplied by alpha / rank; default is the rank.
        targets: layers of the blocks: all, attention, self-attention or feed-forward; or a regular expression
            of names such as ffn.net.2.
        dropout: share of a LoRA's inputs that are left out, 0 to 1.
        steps: optimizer steps, of each expert.
        batch_size: clips of a step that run together, all of one size.
        accumulation: such batches whose gradients make a step.
        learning_rate: at its highest.
        schedule: of the learning rate, after the warm-up: constant, cosine or linear.
        warmup: steps over which the learning rate rises.
        optimizer: that makes the steps: adamw, or adamw8bit, which needs bitsandbytes.
        weight_decay: of AdamW.
        max_grad_norm: gradients are scaled down to it.
        sampling: of noise levels: shift, logit-normal or uniform.
        shift: of noise levels; default is 12 for T2V-A14B, 5 for I2V-A14B and TI2V-5B, otherwise the
            checkpoint's.
        mean: of logit-normal.
        std: of shift and logit-normal.
        strata: samples in a row whose noise levels are spread evenly.
        weighting: of losses by noise level: none, or bell.
        caption_dropout: share of samples that are trained without their caption.
        first_frame: share of samples whose first frame is given, for TI2V-5B.
        switch_every: steps after which the other expert is trained.
        ema: decay of an average of the weights, which is then what is saved and judged, such as 0.99; 0 is
            none.
        seed: of everything that is random.
        dtype: of the frozen weights: bf16, fp16 or fp32.
        quantize: of the frozen weights: fp8, int8, fp8:low, or fp8:keep=1, which keeps the first and the last
            block; default is none.
        memory: of the GPU that may be used, such as 24GB: frozen blocks that do not fit stay on the host, and
            pass through the GPU as they are needed; default is all of it, with nothing streamed.
        checkpointing: whether activations are computed anew for gradients, which takes less memory.
        device: that trains: cuda, cuda:1 or cpu; default is the best there is.
        save_every: steps of an expert between saved states.
        keep: number of states that are kept.
        validation: folder of other clips, by `wan22 cache`; their loss at fixed noise is measured.
        validate_every: steps of an expert between validations.
        validation_levels: noise levels of each clip.
        sample_prompts: file of prompts, one a line, of which videos are made: .txt, or .jsonl with prompt,
            image, seed and other arguments of the call.
        sample_every: steps of an expert between videos; 0 makes them at the end alone.
        diffusers_names: whether names in the file are diffusers' and PEFT's, not ComfyUI's generic ones.
        tracker: where losses are logged beside losses.jsonl: tensorboard, or another one that accelerate has.
    """

    model: str
    data: str
    output: str
    name: str = "lora"
    expert: Experts = "both"
    method: Method = "lora"
    rank: int = 32
    alpha: float | None = None
    targets: str = "all"
    dropout: float = 0.0
    steps: int = 2000
    batch_size: int = 1
    accumulation: int = 1
    learning_rate: float = 1e-4
    schedule: Schedule = "constant"
    warmup: int = 0
    optimizer: Optimizer = "adamw"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    sampling: Sampling = "shift"
    shift: float | None = None
    mean: float = 0.0
    std: float = 1.0
    strata: int = 16
    weighting: Weighting = "none"
    caption_dropout: float = 0.05
    first_frame: float = 0.5
    switch_every: int = 10
    ema: float = 0.0
    seed: int = 0
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    quantize: str | None = None
    memory: str | None = None
    checkpointing: bool = True
    device: str | None = None
    save_every: int = 250
    keep: int = 2
    validation: str | None = None
    validate_every: int = 100
    validation_levels: int = 4
    sample_prompts: str | None = None
    sample_every: int = 0
    diffusers_names: bool = False
    tracker: str | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if choices := _choices(item.type):
                if value is not None or type(None) not in get_args(item.type):
                    check_choice(item.name, value, choices)
            elif item.type in (str, str | None) and not (value is None or isinstance(value, str)):
                raise ValueError(f"{item.name}={shown(value)} must be text")
            elif item.type is bool and not isinstance(value, bool):
                raise ValueError(f"{item.name}={shown(value)} must be true or false")
        for name in ("model", "data", "output", "name"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        if Path(self.name).name != self.name:
            raise ValueError(
                f"name={shown(self.name)} is the beginning of file names; output is for the folder"
            )
        for name in (
            *("rank", "steps", "batch_size", "accumulation", "strata", "switch_every", "save_every", "keep"),
            *("validate_every", "validation_levels"),
        ):
            check_positive_int(name, getattr(self, name))
        for name in ("warmup", "sample_every"):
            check_positive_int(name, getattr(self, name), least=0)
        check_positive_int("seed", self.seed, most=2**63 - 1, least=0)
        for name in ("dropout", "caption_dropout", "first_frame", "ema"):
            check_real(name, getattr(self, name), 0, 1)
        for name in ("learning_rate", "max_grad_norm", "std"):
            check_real(name, getattr(self, name), 0, above=True)
        for name in ("alpha", "shift"):
            if getattr(self, name) is not None:
                check_real(name, getattr(self, name), 0, above=True)
        check_real("weight_decay", self.weight_decay, 0)
        check_real("mean", self.mean)
        self._check_together()

    def _check_together(self) -> None:
        if self.ema == 1 or self.dropout == 1:
            name = "ema" if self.ema == 1 else "dropout"
            raise ValueError(f"{name}=1 would leave nothing to train; it must be below 1")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup} must be below steps={self.steps}")
        if self.method == "full" and self.quantize is not None:
            raise ValueError(
                f"quantize={shown(self.quantize)} is for frozen weights; method='full' trains all"
            )
        if self.memory is not None:
            parse_bytes(self.memory, "memory")
            if self.method == "full":
                raise ValueError(
                    f"memory={shown(self.memory)} streams frozen weights; method='full' has none"
                )
        if self.dropout and self.method == "full":
            raise ValueError(f"dropout={self.dropout} is a LoRA's; method='full' has none")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"targets={shown(self.targets)} must be {', '.join(TARGETS)}, or a regular expression; "
                f"this is none: {error}"
            ) from error

    @property
    def pattern(self) -> str:
        """The regular expression of the layers' names in their blocks."""
        return TARGETS.get(self.targets, self.targets)

    def changed(self, **changes: Any) -> "TrainConfig":
        """Return the settings with some replaced."""
        refuse_unknown("the training", changes, [f.name for f in fields(self)])
        return replace(self, **changes)

    def plain(self) -> dict[str, Any]:
        """Return the settings that are not None, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def to_toml(self) -> str:
        """Return the settings as TOML; `read_config` takes them again."""
        # JSON writes text, numbers and truth values as TOML has them, but for floats without a point.
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in self.plain().items())

    def check_resumes(self, before: Mapping[str, Any]) -> None:
        """Refuse to go on with a training whose settings were others, by a ValueError."""
        now = self.plain()
        for name in sorted({*before, *now} - FREE):
            if name == "steps" and self.schedule == "constant":
                continue
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{self.output} was trained with {name}={shown(before.get(name))}, and "
                    f"{name}={shown(now.get(name))} is given; give the former, or another output"
                )


def read_config(file: str | Path | None = None, **settings: Any) -> TrainConfig:
    """Return the settings in a TOML file, and those given beside it, which come first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no TOML, has unknown names, or a setting breaks its rule.
    """
    known = [f.name for f in fields(TrainConfig)]
    read: dict[str, Any] = {}
    if file is not None:
        read = parse_toml(file)
        if nested := [name for name, value in read.items() if isinstance(value, dict | list)]:
            raise ValueError(f"{cut(file)}: {cut(nested[0])} must be one value; a training has no tables")
        try:
            refuse_unknown(cut(file), read, known)
        except TypeError as error:
            raise ValueError(str(error)) from error
        read = {name: _as_declared(name, value) for name, value in read.items()}
    given = read | settings
    if missing := [name for name in ("model", "data", "output") if given.get(name) is None]:
        raise ValueError(f"{missing[0]} is not given")
    try:
        return TrainConfig(**given)
    except ValueError as error:
        raise ValueError(f"{cut(file)}: {error}" if file is not None else str(error)) from error


def _as_declared(name: str, value: Any) -> Any:
    kinds = {f.name: f.type for f in fields(TrainConfig)}
    return float(value) if kinds[name] in (float, float | None) and type(value) is int else value


def _choices(kind: Any) -> tuple[str, ...]:
    members = get_args(kind) if get_origin(kind) is not Literal else (kind,)
    return next((get_args(m) for m in members if get_origin(m) is Literal), ())
