"""The models, with the files and folders that they can be loaded from."""

import inspect
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import snapshot_download
from torch import nn

from ...checks import as_path, keywords_of, refuse_unknown, shown
from ...downloads import reaching
from ...models import autoencoder, transformer
from ...private_apis import uncompiled
from ..files import hub
from ..files.damage import errors_named
from ..files.folders import DIFFUSERS, Names, candidates, names_of, weights_in
from ..files.safetensors import stored_dtype
from ..lora.plain import plain_state
from ..naming import schemas
from ..naming.configs import (
    Shapes,
    autoencoder_config,
    autoencoder_layout,
    refuse_other_transformers,
    transformer_config,
)
from ..naming.keys import TRANSFORMER, KeyTable, autoencoder_keys
from .diffusers_models import DiffusersAutoencoder, DiffusersTransformer
from .dtypes import read_dtype
from .fill import account, empty_weights
from .saving import check_saving, save_aligned
from .single_file import DIFFUSERS_NAMES, STEERING, Arguments, Source, only_source, read_source
from .stored import Config, ModelFormat, read_as

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

# Components of a pipeline that wan22 has a class of; a caller may give diffusers' own of the same name.
OWN_MODELS = ("vae", "transformer", "transformer_2")
# Arguments of `from_pretrained` that we follow, and those that only diffusers' loader does.
_OWN = hub.OPTIONS | STEERING | {"dtype", "dequantize", "subfolder", "variant"}
_OF_DIFFUSERS = {
    *("device_map", "max_memory", "offload_folder", "quantization_config", "parallel_config", "dduf_entries"),
    *("use_flashpack", "flashpack_kwargs", "output_loading_info", "ignore_mismatched_sizes", "proxies"),
}


class _DiffusersFormat(ModelFormat):
    def __init__(self, cls: Any) -> None:
        self.cls = cls

    @abstractmethod
    def official_config(self, source: str, shapes: Shapes, given: Config, known: Config) -> Config: ...

    def names(self, source: str, names: Iterable[str]) -> dict[str, str]:
        ignored = set(self.cls._keys_to_ignore_on_load_unexpected or ())
        return super().names(source, [n for n in names if ignored.isdisjoint(n.split("."))])

    def config(self, source: str, shapes: Shapes, given: Config, known: Config) -> Config:
        if given.get("_class_name") == self.cls.__name__:
            return given
        official = self.tables(shapes)[0].inverse
        shapes = {str(official.rename(name)): shape for name, shape in shapes.items()}
        return self.official_config(source, shapes, given, known)

    def build(self, config: Config) -> nn.Module:
        with empty_weights():
            return self.cls.from_config(config) if "_class_name" in config else self.cls(**config)

    def settings(self, config: Config) -> Config:
        model: Any = self.build(config)
        return json.loads(model.to_json_string())

    def in_float32(self, model: Any, dtype: torch.dtype | None) -> Iterable[str]:
        kept = model._keep_in_fp32_modules or ()
        return (kept,) if isinstance(kept, str) else kept


class _TransformerFormat(_DiffusersFormat):
    kind = "transformer"
    schema = schemas.TRANSFORMER

    def tables(self, names: Iterable[str]) -> Sequence[KeyTable]:
        return (TRANSFORMER,)

    def names(self, source: str, names: Iterable[str]) -> dict[str, str]:
        refuse_other_transformers(source, names)
        return super().names(source, names)

    def official_config(self, source: str, shapes: Shapes, given: Config, known: Config) -> Config:
        if missing := schemas.needed(given) - given.keys():
            raise ValueError(f"{source}: the config.json beside it has no entry {min(missing)}")
        if {"dim", "num_heads", "eps"} <= given.keys():  # which the shapes do not determine
            head_dim = given["dim"] // given["num_heads"]
            known = {"attention_head_dim": head_dim, "eps": given["eps"]} | known
        return transformer_config(source, shapes, known.get("attention_head_dim")) | known


class _AutoencoderFormat(_DiffusersFormat):
    kind = "vae"
    schema = schemas.AUTOENCODER

    def tables(self, names: Iterable[str]) -> Sequence[KeyTable]:
        layout = autoencoder_layout(names)
        return (autoencoder_keys(layout.residual, layout.blocks, layout.levels),)

    def official_config(self, source: str, shapes: Shapes, given: Config, known: Config) -> Config:
        return autoencoder_config(source, shapes) | known


class FromFiles:
    """Lets a model be loaded from any file or folder that holds its weights."""

    _format: type[_DiffusersFormat]
    _official_files: tuple[str, ...]  # patterns of the weights' names in the official layout

    @classmethod
    def from_single_file(
        cls,
        source: Source | None = None,
        dtype: torch.dtype | str | None = None,
        dequantize: bool = False,
        **options: Any,
    ) -> "Self":
        """Load a model from a weight file, in evaluation mode; its sizes are inferred from its tensors.

        Args:
            source: safetensors (float8, too, scaled or not), PyTorch's .pth, or GGUF, also with other models
                in the same file; a folder of shards; an address such as
                "https://huggingface.co/org/name/blob/main/file.gguf" or "org/name/file.gguf"; or a table of
                tensors by name. In diffusers: pretrained_model_link_or_path_or_dict.
            dtype: dtype of the parameters, or its name; None or "auto": as they are stored, bfloat16 for
                those that were quantised. In diffusers: torch_dtype, and compute_dtype of a
                GGUFQuantizationConfig.
            dequantize: whether to expand quantised weights, which stay quantised otherwise.
            **options: entries of the configuration that shapes do not determine, such as attention_head_dim,
                128 in every released transformer. The hub's options. Of diffusers': `config` and `subfolder`,
                a folder or repository whose config.json is held against the tensors if it is on this machine;
                `device`, or a `device_map` to one device. `low_cpu_mem_usage`, `disable_mmap`,
                `use_safetensors` and device maps such as "auto" have no effect.

        Raises:
            FileNotFoundError: there is no such file, or a shard is missing.
            TypeError: there is no such argument.
            ValueError: the file cannot be read, is another model's, or holds weights that have no place; or
                an argument asks for what cannot be done.
        """
        source, form = only_source(source, options), cls._format(cls)
        given = Arguments.of(dtype, options, form.kind)
        known_names = {*keywords_of(cls.from_single_file), *STEERING, *hub.OPTIONS, *DIFFUSERS_NAMES}
        refuse_unknown(f"{cls.__name__}.from_single_file", given.others, {*known_names, *_entries(cls)})
        known = {n: v for n, v in given.reference.entries.items() if n == "attention_head_dim"}
        stored = read_as(form, read_source(source, given.access), known=known | dict(given.others))
        model = given.reference.agreed(stored, cls.__name__, given.others).load(given.dtype, dequantize)
        return model if given.device is None else model.to(given.device)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "Self":
        """Load a model from a folder or hub repository in the Diffusers or the official layout, or a file.

        The model is in evaluation mode; errors are those of `from_single_file`.

        Args:
            pretrained_model_name_or_path: folder, repository or file.
            **kwargs: `subfolder`, the hub's options, and `dtype` and `dequantize` of `from_single_file`; in
                the Diffusers layout those of diffusers' `from_pretrained`, too, such as `variant` and
                `device_map`, in the others entries of the configuration.
        """
        source, subfolder = str(pretrained_model_name_or_path), kwargs.get("subfolder") or ""
        known_names = {*_OWN, *_OF_DIFFUSERS, *_entries(cls), "torch_dtype"}
        refuse_unknown(f"{cls.__name__}.from_pretrained", kwargs, known_names)
        asked = kwargs.pop("torch_dtype", None)
        kwargs["dtype"] = read_dtype(asked if kwargs.get("dtype") is None else kwargs["dtype"])
        access = {n: kwargs[n] for n in hub.OPTIONS & kwargs.keys()}
        root = hub.local_file(source, **access)

        def download(*names: str) -> Path:
            patterns = [str(Path(subfolder, name)) for name in names]
            with reaching(source, options=access):
                return Path(snapshot_download(source, allow_patterns=patterns, **access))

        local = root.exists()
        if not local:
            hub.check_repository_name(source)
            root = download("config.json", "*.index*.json")
        place = root / subfolder
        config, known = schemas.read_config(place / "config.json"), {}
        in_diffusers_layout = config.get("_class_name") == cls.__name__
        if in_diffusers_layout:
            variant, asked_of_diffusers = kwargs.get("variant"), needs_diffusers(kwargs)
            names = names_of(DIFFUSERS, kwargs.get("use_safetensors"))
            if local:
                path = weights_in(place, variant, names)
            elif not asked_of_diffusers:
                path = _downloaded(place, variant, names, download)
            if asked_of_diffusers or "quantization_config" in config:
                return cls._from_diffusers(source, **kwargs)
        else:
            if not local:
                download(*cls._official_files)
            path = cls._official_weights(place)
            known = {name: value for name, value in kwargs.items() if name not in _OWN}
            if others := sorted(known.keys() & _OF_DIFFUSERS):
                raise ValueError(f"{others[0]} works with folders in the Diffusers layout; {place} is none")
        model = read_as(cls._format(cls), path, config, known).load(
            kwargs["dtype"], kwargs.get("dequantize", False)
        )
        if in_diffusers_layout:
            model.register_to_config(_name_or_path=source)
        return model

    @classmethod
    def _from_diffusers(cls, source: str, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a model in the Diffusers layout as diffusers does, but refuse what it only warns of."""
        load = super().from_pretrained  # type: ignore[misc]
        place = as_path(Path(source) / (kwargs.get("subfolder") or ""))
        if kwargs["dtype"] is None and place.is_dir():  # diffusers would take float32
            kwargs["dtype"] = stored_dtype(place, kwargs.get("variant"))
        kwargs = {name: value for name, value in kwargs.items() if name not in STEERING | {"dequantize"}}
        with errors_named(source):
            model, info = load(source, output_loading_info=True, **kwargs)
        if getattr(model, "hf_quantizer", None) is None:  # those have tensors beside the parameters
            account(source, info["missing_keys"], info["unexpected_keys"])
        return (model, info) if output_loading_info else model

    @wraps(ModelMixin.save_pretrained, assigned=())  # pipelines look at its parameters' names
    def save_pretrained(self, *args: Any, merge_lora: bool = False, **kwargs: Any) -> None:
        """Save in the Diffusers layout, as diffusers' models do, with ordinary weights.

        Quantised weights are expanded, those of layerwise casting have the dtype they compute in. Fused LoRAs
        are in the weights; a LoRA that is active without being fused is a ValueError, or saved with them if
        `merge_lora`, and the model stays as it is.
        """
        check_saving(self.save_pretrained, kwargs)
        with plain_state([self], merge_lora):
            if not save_aligned(self, *args, **kwargs):
                super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def _official_weights(cls, place: Path) -> Path:
        """Return what to read in the official layout: the file itself, the folder, or the one .pth in it."""
        if not place.exists():
            raise FileNotFoundError(f"there is no folder {place}")
        if (place / "model_index.json").exists():
            advice = f"give subfolder={shown(cls._format.kind)}"
            raise FileNotFoundError(f"{place} holds a pipeline, not a model; {advice} or another one in it")
        if not (place / "config.json").exists() and list(place.glob(f"{DIFFUSERS[0][0]}*")):
            raise FileNotFoundError(
                f"{place} has no config.json beside its weights; from_single_file reads weights without one"
            )
        single = [p for pattern in cls._official_files for p in place.glob(pattern) if p.suffix == ".pth"]
        if len(single) > 1:
            names = ", ".join(sorted(path.name for path in single))
            raise ValueError(f"{place} holds several {cls.__name__}: {names}; give the path of one")
        return single[0] if single else place


class WanTransformer3DModel(FromFiles, DiffusersTransformer):
    """`wan22.models.transformer.WanTransformer3DModel` as a model of diffusers, loadable from any file."""

    _format = _TransformerFormat
    _official_files = ("*.safetensors", "*.safetensors.index.json")


class AutoencoderKLWan(FromFiles, DiffusersAutoencoder):
    """`wan22.models.autoencoder.AutoencoderKLWan` as a model of diffusers, loadable from any file."""

    _format = _AutoencoderFormat
    _official_files = ("*VAE.pth",)


def is_ours(model: Any) -> bool:
    """Whether a model, compiled or not, is wan22's, and not diffusers' own of the same name."""
    return isinstance(uncompiled(model), transformer.WanTransformer3DModel | autoencoder.AutoencoderKLWan)


TRANSFORMER_FORMAT = _TransformerFormat(WanTransformer3DModel)
AUTOENCODER_FORMAT = _AutoencoderFormat(AutoencoderKLWan)


def needs_diffusers(options: Mapping[str, Any]) -> bool:
    """Return whether arguments of `from_pretrained` ask for something that only diffusers' loader does."""
    return any(value not in (None, False) for name, value in options.items() if name not in _OWN)


def _entries(cls: type[Any]) -> list[str]:
    """Return the names of a model's configuration's entries."""
    return list(inspect.signature(cls.__init__).parameters)[1:]  # without self


def _downloaded(place: Path, variant: str | None, names: Names, download: Callable[..., Path]) -> Path:
    """Return a repository's weights after their download; safetensors come before PyTorch's files."""
    for path, shards in candidates(place, variant, names):
        download(path.name, *(shard.name for shard in shards))
        if path.is_file():
            break
    return weights_in(place, variant, names)
