"""What `from_single_file` is given: a file, address or table, and diffusers' arguments beside it."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from ...checks import as_path
from ..files import hub
from ..files.weights import WeightFile, read_weights, weights_of
from ..naming.schemas import check_config, read_config
from .dtypes import read_device, read_dtype
from .stored import Config, StoredModel

logger = logging.getLogger(__name__)

Source = str | Path | Mapping[str, torch.Tensor]

# Names of the first argument in diffusers.
ALIASES = ("pretrained_model_link_or_path_or_dict", "pretrained_model_link_or_path")
# Arguments of diffusers that steer how it loads, and not what: here, weights are memory-mapped, models are
# built without values, and a format is recognised by a file's first bytes.
STEERING = {"low_cpu_mem_usage", "disable_mmap", "use_safetensors", "offload_state_dict"}
_REFUSED = {
    "original_config": "the sizes follow from the tensors; give single entries by their names",
    "original_config_file": "the sizes follow from the tensors; give single entries by their names",
    "proxies": "set the environment variable HTTPS_PROXY",
}
# Further names of diffusers, of which some are of a model alone.
DIFFUSERS_NAMES = {"config", "config_revision", "device", "subfolder", *ALIASES, *_REFUSED}
_EVERYWHERE = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps of diffusers
# What is no fact of the shapes, though it is inferred with them.
_FREE = {"latents_mean", "latents_std"}


@dataclass(frozen=True)
class Reference:
    """A configuration that a caller names: its name, for errors, and its entries."""

    name: str = ""
    entries: Config = field(default_factory=dict)

    def agreed(self, stored: StoredModel, class_name: str, given: Iterable[str] = ()) -> StoredModel:
        """Return a model with the entries that its tensors do not determine, nor the caller has `given`.

        A ValueError names the first entry of which the tensors say otherwise.
        """
        own = self.entries.get("_class_name", class_name)
        if own != class_name:
            raise ValueError(f"config={self.name}: it is the configuration of a {own}, not a {class_name}")
        inferred, free = stored.config, _FREE - set(given)
        for name in sorted(inferred.keys() & self.entries.keys() - _FREE - set(given)):
            said, found = _plain(self.entries[name]), _plain(inferred[name])
            if said != found:
                raise ValueError(
                    f"config={self.name} says {name}={said}, but the tensors of {stored.source} say {found}; "
                    "give the configuration that belongs to the file, or none"
                )
        known = {n: v for n, v in self.entries.items() if n == "_class_name" or not n.startswith("_")}
        facts = {n: v for n, v in inferred.items() if n not in free & known.keys()}
        return replace(stored, config=known | facts)


NO_REFERENCE = Reference()


@dataclass(frozen=True)
class Arguments:
    """The arguments of a `from_single_file`, read."""

    dtype: torch.dtype | None
    device: torch.device | None
    reference: Reference
    access: Mapping[str, Any]  # options of a download
    others: Mapping[str, Any]  # all other arguments

    @classmethod
    def of(cls, dtype: Any, options: Mapping[str, Any], kind: str) -> "Arguments":
        """Read the dtype and the keyword arguments; `kind` names the folder of a configuration.

        A ValueError names an argument that would change the result and has no counterpart here.
        """
        left = {name: value for name, value in options.items() if name not in STEERING}
        for name, advice in _REFUSED.items():
            if left.pop(name, None) is not None:
                raise ValueError(f"{name} is not supported: {advice}")
        asked = left.pop("torch_dtype", None)
        dtype = dtype_asked(asked if dtype is None else dtype, left.pop("quantization_config", None))
        device = device_asked(left.pop("device", None), left.pop("device_map", None))
        access = {name: left.pop(name) for name in hub.OPTIONS & left.keys()}
        place = left.pop("config", None), left.pop("subfolder", None), left.pop("config_revision", None)
        return cls(dtype, device, _reference(*place, kind, access), access, left)


def only_source(source: Source | None, options: dict[str, Any]) -> Any:
    """Return the first argument, taken out of the others if it is given by one of diffusers' names."""
    given = [value for name in ALIASES if (value := options.pop(name, None)) is not None]
    given += [] if source is None else [source]
    if len(given) != 1:
        raise TypeError(f"from_single_file takes one file, address or table of tensors, not {len(given)}")
    return given[0]


def read_source(source: Source, access: Mapping[str, Any]) -> WeightFile:
    """Return the tensors of a file, an address on the hub, or a table."""
    if isinstance(source, Mapping):
        return weights_of(source)
    if not isinstance(source, str | Path):
        kind = type(source).__name__
        raise TypeError(f"from_single_file takes a file, an address or a table of tensors, not a {kind}")
    return read_weights(hub.local_file(source, **access))


def dtype_asked(dtype: Any, quantization_config: Any = None) -> Any:
    """Return the dtype asked for, or a dict of them as it is; in diffusers, GGUF's config has one, too.

    Layers compute in the dtype of what they are given; a ValueError names another kind of quantisation.
    """
    read = dtype if isinstance(dtype, Mapping) else read_dtype(dtype)
    if quantization_config is None:
        return read
    method = getattr(quantization_config, "quant_method", None)
    if getattr(method, "value", method) != "gguf":
        raise ValueError(
            f"quantization_config: a single file cannot be loaded as {type(quantization_config).__name__}; "
            "wan22.accel.quantize quantises a loaded model; GGUFQuantizationConfig is taken"
        )
    computed = read_dtype(quantization_config.compute_dtype, "compute_dtype")
    if dtype is None:
        return computed
    if isinstance(read, torch.dtype) and read != computed:
        logger.warning("compute_dtype=%s has no effect: the model computes in dtype=%s", computed, read)
    return read


def device_asked(device: Any, device_map: Any) -> torch.device | None:
    """Return the one device that a model goes to; None: it stays on the CPU, as with diffusers' "auto"."""
    if device is None and device_map not in (None, *_EVERYWHERE):
        places = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
        if len(set(map(str, places))) != 1 or places[0] == "disk":
            raise ValueError(
                f"device_map={str(device_map)[:200]}: a single file goes to one device; enable an offload "
                "on the pipeline, or give memory= to its constructor"
            )
        device = places[0]
    return None if device is None else read_device(device)


def _reference(
    config: Any, subfolder: str | None, revision: str | None, kind: str, access: Mapping[str, Any]
) -> Reference:
    """Return the configuration that diffusers' `config` and `subfolder` name.

    A repository is not downloaded for it: the tensors say nearly all, and one that is here already the rest.
    """
    if config is None:
        return NO_REFERENCE
    if isinstance(config, Mapping):
        check_config("config={…}", config)
        return Reference("{…}", dict(config))
    cache = access.get("cache_dir")
    root, places = as_path(config), [subfolder or "", kind]
    if root.is_file():
        return Reference(str(root), read_config(root))
    if root.is_dir():
        found = [path for place in places if (path := root / place / "config.json").is_file()]
        if not found:
            raise FileNotFoundError(f"config={config}: there is no file {root / places[0] / 'config.json'}")
        return Reference(str(found[0]), read_config(found[0]))
    hub.check_repository_name(str(config), "folder config=")
    for place in places:
        name = str(Path(place, "config.json"))
        try:
            here = hf_hub_download(config, name, revision=revision, cache_dir=cache, local_files_only=True)
        except (OSError, ValueError):  # not here
            continue
        return Reference(f"{config}/{name}", read_config(Path(here)))
    logger.info("config=%s is not on this machine; the sizes are those of the tensors", config)
    return NO_REFERENCE


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
