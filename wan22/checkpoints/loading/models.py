"""The models, with the files and folders that they can be loaded from."""

import json
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import snapshot_download
from torch import nn

from ..files import hub
from ..files.weights import read_json, shards_of
from ..naming.configs import (
    Shapes,
    autoencoder_config,
    autoencoder_layout,
    refuse_other_transformers,
    transformer_config,
)
from ..naming.keys import TRANSFORMER, KeyTable, autoencoder_keys
from .diffusers_models import DiffusersAutoencoder, DiffusersTransformer
from .fill import account, empty_weights
from .quantized_linear import expanded_state
from .stored import Config, ModelFormat, read_as


class DiffusersFormat(ModelFormat):
    """A transformer or an autoencoder, under diffusers' names.

    Args:
        cls: the class to build.
    """

    def __init__(self, cls: "type[FromFiles]") -> None:
        self.cls, self.kind = cls, cls._kind
        self.ignored = set(cls._keys_to_ignore_on_load_unexpected or ())

    def tables(self, names: Iterable[str]) -> Sequence[KeyTable]:
        """Return the official table, which may depend on the sizes that the names tell."""
        return (self.cls._keys(names),)

    def names(self, source: str, names: Iterable[str]) -> dict[str, str]:
        """Return the file's name of each of the model's; tensors of modules that no model uses are left out.

        Raises:
            ValueError: there are names that the table does not know, or another transformer's.
        """
        names = [name for name in names if self.ignored.isdisjoint(name.split("."))]
        self.cls._refuse_others(source, names)
        return super().names(source, names)

    def config(self, source: str, shapes: Shapes, given: Config, known: Config) -> dict[str, Any]:
        """Return the class's arguments, or the whole config.json of the Diffusers layout."""
        if given.get("_class_name") == self.cls.__name__:
            return dict(given)
        table = self.cls._keys(shapes).inverse
        return self.cls._config(source, {str(table.rename(n)): s for n, s in shapes.items()}, given, known)

    def build(self, config: Config) -> nn.Module:
        """Return the model on the meta device."""
        cls: Any = self.cls
        with empty_weights():
            return cls.from_config(dict(config)) if "_class_name" in config else cls(**config)

    def settings(self, config: Config) -> dict[str, Any]:
        """Return config.json as diffusers writes it."""
        model: Any = self.build(config)
        return json.loads(model.to_json_string())

    def in_float32(self, model: Any, dtype: torch.dtype | None) -> Iterable[str]:
        """Return what the model's formulas need in float32."""
        return model._keep_in_fp32_modules or ()


class FromFiles:
    """Lets a model be loaded from any file or folder that holds its weights."""

    _kind: str
    _official_files: tuple[str, ...]  # patterns of the weights' names in the official layout
    _keys_to_ignore_on_load_unexpected: Any

    @classmethod
    @abstractmethod
    def _keys(cls, names: Iterable[str]) -> KeyTable:
        """Return the table from official names to ours for the model with these names, in either naming."""

    @classmethod
    @abstractmethod
    def _config(cls, source: str, shapes: Shapes, given: Config, known: Config) -> dict[str, Any]:
        """Return the configuration of the model with these tensors, under official names.

        Args:
            source: the file, for errors.
            shapes: shapes of the tensors.
            given: the official config.json; ignored if it is another model's.
            known: entries that the caller gives.
        """

    @classmethod
    def _refuse_others(cls, source: str, names: Iterable[str]) -> None:
        """Refuse by name a model of the family that is not supported."""

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        dequantize: bool = False,
        torch_dtype: torch.dtype | None = None,
        **config: Any,
    ) -> Any:
        """Load a model from a weight file of any format; what it holds is told from its tensors.

        Args:
            path: safetensors (float8, too, scaled or not), PyTorch's .pth, or GGUF; or a folder of shards.
            dtype: of the parameters; None: as they are stored, bfloat16 for those that were quantised.
            dequantize: whether to expand quantised weights, which stay quantised otherwise.
            torch_dtype: another name for dtype.
            **config: entries of the configuration that are not what the shapes say, such as
                attention_head_dim, 128 in every released transformer.

        Returns: the model, in evaluation mode.

        Raises:
            FileNotFoundError: there is no such file, or a shard is missing.
            ValueError: the file cannot be read, is another model's, or holds weights that have no place.
        """
        return read_as(DiffusersFormat(cls), Path(path), known=config).load(dtype or torch_dtype, dequantize)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load a model from a folder or hub repository in the Diffusers or the official layout, or a file.

        Args:
            pretrained_model_name_or_path: folder, repository or file.
            **kwargs: `subfolder`, the hub's options, and those of `from_single_file`; in the Diffusers layout
                those of diffusers' `from_pretrained`, too, such as `variant` and `device_map`.

        Returns: the model, in evaluation mode.

        Raises:
            FileNotFoundError: there is no such file, or a shard is missing.
            ValueError: it cannot be read, is another model's, or holds weights that have no place.
        """
        source, subfolder = str(pretrained_model_name_or_path), kwargs.get("subfolder") or ""
        root, access = Path(source).expanduser(), {n: kwargs[n] for n in hub.OPTIONS & kwargs.keys()}
        local = root.exists()
        if not local:
            hub.check_repository_name(source)
            wanted = [str(Path(subfolder, "config.json")), str(Path(subfolder, "*.index*.json"))]
            try:
                root = Path(snapshot_download(source, allow_patterns=wanted, **access))
            except (OSError, ValueError):  # not there, or not reached: diffusers says what is wrong
                return super().from_pretrained(source, **kwargs)  # type: ignore[misc]
        place = root / subfolder
        config = read_json(place / "config.json")
        if config.get("_class_name") == cls.__name__:
            files = diffusers_weights(place, kwargs.get("variant"))
            if "quantization_config" in config or needs_diffusers(kwargs):
                return cls._from_diffusers(source, **kwargs)
            if not local:
                names = [str(Path(subfolder, file.name)) for file in files]
                snapshot_download(source, allow_patterns=names, **access)
            if not files[0].is_file():  # not safetensors
                return cls._from_diffusers(source, **kwargs)
            dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
            stored = read_as(DiffusersFormat(cls), files[0], config)
            model = stored.load(dtype, kwargs.get("dequantize", False))
            model.register_to_config(_name_or_path=source)
            return model
        if not local:
            wanted_files = [str(Path(subfolder, pattern)) for pattern in cls._official_files]
            snapshot_download(source, allow_patterns=wanted_files, **access)
        options = {k: v for k, v in kwargs.items() if k != "subfolder" and k not in hub.OPTIONS}
        dtype, dequantize = options.pop("dtype", None), options.pop("dequantize", False)
        dtype = dtype or options.pop("torch_dtype", None)
        return read_as(DiffusersFormat(cls), cls._weights_in(place), config, options).load(dtype, dequantize)

    @classmethod
    def _from_diffusers(cls, source: str, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a model in the Diffusers layout as diffusers does, but refuse what it only warns of."""
        load = super().from_pretrained  # type: ignore[misc]
        model, info = load(source, output_loading_info=True, **kwargs)
        if getattr(model, "hf_quantizer", None) is None:  # those have tensors beside the parameters
            account(source, info["missing_keys"], info["unexpected_keys"])
        return (model, info) if output_loading_info else model

    @wraps(ModelMixin.save_pretrained, assigned=())  # pipelines look at its parameters' names
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save in the Diffusers layout, as diffusers' models do; quantised weights are expanded."""
        with expanded_state():
            super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def _weights_in(cls, place: Path) -> Path:
        """Return what to read in the official layout: the file itself, the folder, or the one file in it."""
        files = [path for pattern in cls._official_files for path in sorted(place.glob(pattern))]
        single = [path for path in files if path.suffix == ".pth"]
        if len(single) > 1:
            names = ", ".join(path.name for path in single)
            raise ValueError(f"{place} holds several {cls.__name__}: {names}; give the path of one")
        return single[0] if single else place


class WanTransformer3DModel(FromFiles, DiffusersTransformer):
    """`wan22.models.transformer.WanTransformer3DModel` as a model of diffusers, loadable from any file."""

    _kind = "transformer"
    _official_files = ("*.safetensors", "*.safetensors.index.json")

    @classmethod
    def _keys(cls, names: Iterable[str]) -> KeyTable:
        return TRANSFORMER

    @classmethod
    def _config(cls, source: str, shapes: Shapes, given: Config, known: Config) -> dict[str, Any]:
        known = _official_settings(given) | known
        return transformer_config(source, shapes, known.get("attention_head_dim")) | known

    @classmethod
    def _refuse_others(cls, source: str, names: Iterable[str]) -> None:
        refuse_other_transformers(source, names)


class AutoencoderKLWan(FromFiles, DiffusersAutoencoder):
    """`wan22.models.autoencoder.AutoencoderKLWan` as a model of diffusers, loadable from any file."""

    _kind = "vae"
    _official_files = ("*VAE.pth",)

    @classmethod
    def _keys(cls, names: Iterable[str]) -> KeyTable:
        layout = autoencoder_layout(names)
        return autoencoder_keys(layout.residual, layout.blocks, layout.levels)

    @classmethod
    def _config(cls, source: str, shapes: Shapes, given: Config, known: Config) -> dict[str, Any]:
        return autoencoder_config(source, shapes) | known


# What diffusers' own loader is for: values of other arguments than these, or other values of these.
_OWN = hub.OPTIONS | {"dtype", "torch_dtype", "dequantize", "subfolder", "variant"}
_DEFAULTS = {"low_cpu_mem_usage": (None, True), "use_safetensors": (None, True)}


def needs_diffusers(options: dict[str, Any]) -> bool:
    """Return whether arguments of `from_pretrained` ask for something that only diffusers' loader does."""
    others = {name: value for name, value in options.items() if name not in _OWN}
    return any(
        all(value is not default for default in _DEFAULTS.get(name, (None, False)))
        for name, value in others.items()
    )


def diffusers_weights(place: Path, variant: str | None) -> list[Path]:
    """Return the safetensors files of a folder in the Diffusers layout: one, or an index and what it lists.

    Args:
        place: the folder, of which the index must be there if it has one.
        variant: such as "fp16", part of the files' names.
    """
    ending = f".{variant}" if variant else ""
    index = place / f"diffusion_pytorch_model.safetensors.index{ending}.json"
    if not index.is_file():
        return [place / f"diffusion_pytorch_model{ending}.safetensors"]
    return [index, *(place / name for name in sorted(set(shards_of(index).values())))]


def _official_settings(config: Config) -> dict[str, Any]:
    """Return what an official transformer's config.json says that the shapes do not."""
    if not {"dim", "num_heads"} <= config.keys():
        return {}
    return {"attention_head_dim": config["dim"] // config["num_heads"], "eps": config["eps"]}
