"""What the configurations of models and schedulers may say, checked when a file is read, before it is used.

Limits are several times those of every release; beyond them, building a model takes minutes or all memory.
Entries that no schema names are left to the classes that read them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checks import check_choice, check_positive_int, check_real, shown
from ..files.weights import read_json

Entry = Callable[[str, Any], Any]
Config = Mapping[str, Any]

# ---- kinds of entries ----


def _count(most: int, least: int = 1, multiple: int = 1) -> Entry:
    def check(name: str, value: Any) -> None:
        check_positive_int(name, value, most, least)
        if value % multiple:
            near = value + multiple - value % multiple
            raise ValueError(f"{name}={value} must be a multiple of {multiple}; the nearest is {near}")

    return check


def _number(least: float, most: float) -> Entry:
    return lambda name, value: check_real(name, value, least, most)


def _above(least: float, most: float) -> Entry:
    return lambda name, value: check_real(name, value, least, most, above=True, hint=f"at most {most:g}")


def _choice(*choices: str) -> Entry:
    return lambda name, value: check_choice(name, value, choices)


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be true or false")


def _fixed(value: bool | str, why: str) -> Entry:
    """Return a check that an entry has the only value that Wan's models have."""

    def check(name: str, found: Any) -> None:
        if found != value or type(found) is not type(value):
            raise ValueError(f"{name}={shown(found)} must be {json.dumps(value)}: {why}")

    return check


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}={shown(value)} must be a text")


def _quantization(name: str, value: Any) -> None:
    from transformers.utils.quantization_config import QuantizationMethod

    method = value.get("quant_method") if isinstance(value, dict) else value
    check_choice(f"quant_method of {name}", method, [known.value for known in QuantizationMethod])


def _optional(entry: Entry) -> Entry:
    return lambda name, value: None if value is None else entry(name, value)


def _several(entry: Entry, least: int, most: int | None = None) -> Entry:
    """A list of `least` to `most` of an entry."""

    def check(name: str, value: Any) -> None:
        rule = f"a list of {least}" if most is None else f"a list of {least} to {most}"
        if not isinstance(value, list | tuple) or not least <= len(value) <= (
            least if most is None else most
        ):
            what = f"{len(value)} entries" if isinstance(value, list | tuple) else shown(value)
            raise ValueError(f"{name} has {what}; it must be {rule}")
        for index, one in enumerate(value):
            entry(f"{name}[{index}]", one)

    return check


# ---- entries that depend on each other: each function yields what is wrong ----


def _no_rules(config: Config) -> Iterable[str]:
    return ()


def _official_rules(config: Config) -> Iterator[str]:
    if not {"dim", "num_heads"} <= config.keys():  # of a repository whose weights are not here
        return
    size, rest = divmod(config["dim"], config["num_heads"])
    if rest or size < 6 or size % 2:
        told = f"dim={config['dim']} and num_heads={config['num_heads']}"
        yield f"{told} must give heads of one even size, 6 or more"


def _transformer_rules(config: Config) -> Iterator[str]:
    tokens = config.get("pos_embed_seq_len")
    if tokens is not None and config.get("image_dim") is None:
        yield f"pos_embed_seq_len={tokens} is of image tokens, and image_dim says that there are none"


def _autoencoder_rules(config: Config) -> Iterator[str]:
    channels = config.get("z_dim")
    for name in ("latents_mean", "latents_std"):
        if channels is not None and len(config.get(name, range(channels))) != channels:
            yield f"{name} has {len(config[name])} numbers; it must have one for each of z_dim={channels}"
    factors, halved = (config.get(name) for name in ("dim_mult", "temperal_downsample"))
    if factors and halved is not None and len(halved) != len(factors) - 1:
        yield f"temperal_downsample has {len(halved)} entries; it must have one fewer than dim_mult"
    for name in ("in_channels", "out_channels"):
        cells = (config.get("patch_size") or 1) ** 2
        if config.get(name, cells) % cells:
            yield f"{name}={config[name]} must be a multiple of the {cells} pixels of patch_size"


@dataclass(frozen=True)
class Schema:
    """The entries of one kind of configuration, and what holds among several."""

    entries: Mapping[str, Entry]
    rules: Callable[[Config], Iterable[str]] = _no_rules

    def check(self, source: str, config: Config) -> None:
        """Refuse a configuration by a ValueError, one line with the source, the entry and the rule."""
        for name, check in self.entries.items():
            try:
                if name in config:
                    check(name, config[name])
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error
        for wrong in self.rules(config):
            raise ValueError(f"{source}: {wrong}")


# ---- the schemas, by `_class_name` or `model_type` ----

_LAYERS, _WIDTH, _PIXELS = 256, 2**17, 2**14
_EPS = _number(0, 0.1)
_PATCH = _count(64)
_DTYPE = _choice("auto", "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
TRANSFORMER = Schema(
    {
        "patch_size": _several(_PATCH, 3),
        "num_attention_heads": _count(1024),
        "attention_head_dim": _count(4096, 6, multiple=2),  # each of three axes rotates pairs of channels
        "in_channels": _count(4096),
        "out_channels": _optional(_count(4096)),
        "text_dim": _count(_WIDTH),
        "freq_dim": _count(_WIDTH, 2, multiple=2),  # sine and cosine
        "ffn_dim": _count(2**20),
        "num_layers": _count(_LAYERS),
        "cross_attn_norm": _flag,
        "qk_norm": _choice("rms_norm_across_heads"),
        "eps": _EPS,
        "image_dim": _optional(_count(_WIDTH)),
        "added_kv_proj_dim": _optional(_count(_WIDTH)),
        "rope_max_seq_len": _count(2**31),
        "pos_embed_seq_len": _optional(_count(2**20)),
    },
    rules=_transformer_rules,
)
OFFICIAL_TRANSFORMER = Schema(
    {"dim": _count(2**20), "num_heads": _count(1024), "eps": _EPS},
    rules=_official_rules,
)
AUTOENCODER = Schema(
    {
        "base_dim": _count(4096),
        "decoder_base_dim": _optional(_count(4096)),
        "z_dim": _count(1024),
        "dim_mult": _several(_count(64), 1, 8),
        "num_res_blocks": _count(32),
        "attn_scales": _several(_number(0, 64), 0, 8),
        "temperal_downsample": _several(_flag, 0, 8),
        "dropout": _number(0, 1),
        "latents_mean": _several(_number(-1e4, 1e4), 1, 1024),
        "latents_std": _several(_number(1e-4, 1e4), 1, 1024),
        "is_residual": _flag,
        "in_channels": _count(4096),
        "out_channels": _count(4096),
        "patch_size": _optional(_PATCH),
        "scale_factor_temporal": _optional(_count(1024)),
        "scale_factor_spatial": _optional(_count(1024)),
    },
    rules=_autoencoder_rules,
)
TEXT_ENCODER = Schema(
    {
        "vocab_size": _count(2**24),
        "d_model": _count(_WIDTH),
        "d_kv": _count(4096),
        "d_ff": _count(2**20),
        "num_layers": _count(_LAYERS),
        "num_heads": _count(1024),
        "relative_attention_num_buckets": _count(2**16, 4, multiple=2),
        "relative_attention_max_distance": _count(2**20, 2),
        "feed_forward_proj": _choice("gated-gelu"),
        "layer_norm_epsilon": _EPS,
        "dtype": _optional(_DTYPE),
        "torch_dtype": _optional(_DTYPE),
        "quantization_config": _quantization,
    }
)
IMAGE_ENCODER = Schema(
    {
        "hidden_size": _count(_WIDTH),
        "intermediate_size": _count(2**20),
        "num_hidden_layers": _count(_LAYERS),
        "num_attention_heads": _count(1024),
        "num_channels": _count(64),
        "image_size": _count(_PIXELS),
        "patch_size": _count(_PIXELS),
        "layer_norm_eps": _EPS,
        "dtype": _optional(_DTYPE),
        "torch_dtype": _optional(_DTYPE),
        "quantization_config": _quantization,
    }
)
_FLOW = "Wan's models are trained by flow matching"
SCHEDULER = Schema(
    {
        "_class_name": _text,
        "flow_shift": _above(0, 1000),
        "shift": _above(0, 1000),
        "num_train_timesteps": _count(10**6, 2),
        "solver_order": _count(8),
        "prediction_type": _fixed("flow_prediction", _FLOW),
        "use_flow_sigmas": _optional(_fixed(True, _FLOW)),
        "use_dynamic_shifting": _optional(_fixed(False, "Wan's shift is one number for all sizes")),
        "solver_type": _choice("bh1", "bh2", "midpoint", "heun", "logrho"),
    }
)
INDEX = Schema({"boundary_ratio": _optional(_number(0, 1)), "expand_timesteps": _flag})

_BY_CLASS = {
    "WanTransformer3DModel": TRANSFORMER,
    "WanModel": OFFICIAL_TRANSFORMER,
    "AutoencoderKLWan": AUTOENCODER,
}
_BY_TYPE = {"umt5": TEXT_ENCODER, "clip_vision_model": IMAGE_ENCODER}


# ---- reading ----


def read_config(path: Path, schema: Schema | None = None) -> dict[str, Any]:
    """Return a model's config.json, {} if there is no such file.

    The schema is that of the class which the file names, if none is given. A ValueError says in one line that
    the file is no JSON, is empty, or has an entry of another kind or range.
    """
    config = read_json(path)
    if not config and path.is_file():
        raise ValueError(f"{path} is an empty table")
    check_config(str(path), config, schema)
    return config


def check_config(source: str, config: Config, schema: Schema | None = None) -> None:
    """Refuse a configuration with an entry of another kind or range; see `read_config`."""
    if schema := schema or _schema_of(config):
        schema.check(source, config)


def needed(config: Config) -> set[str]:
    """Return what an official config.json must say, as no tensor's shape does; nothing of any other one."""
    return {"dim", "num_heads", "eps"} if _schema_of(config) is OFFICIAL_TRANSFORMER else set()


def _schema_of(config: Config) -> Schema | None:
    by_class, by_type = (config.get(name) for name in ("_class_name", "model_type"))
    if isinstance(by_class, str) and by_class in _BY_CLASS:
        return _BY_CLASS[by_class]
    if by_class is None and {"dim", "num_heads"} <= config.keys():
        return OFFICIAL_TRANSFORMER
    return _BY_TYPE.get(by_type) if isinstance(by_type, str) else None
