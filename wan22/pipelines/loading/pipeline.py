"""A pipeline that is loaded from any checkpoint, and saved in the Diffusers layout."""

import inspect
import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline

from ... import __version__
from ...accel.quantization.settings import Quantization
from ...checkpoints.files.hub import OPTIONS
from ...checkpoints.loading.dtypes import read_dtype
from ...checkpoints.loading.saving import check_saving
from ...checkpoints.loading.single_file import ALIASES, DIFFUSERS_NAMES, Arguments, only_source
from ...checkpoints.lora.plain import plain_state
from ...checks import refuse_unknown
from ...private_apis import signature_keys
from ...progress import loading_bars
from ..attached.provenance import Provenance
from . import hub_classes
from .arguments import check_names
from .checkpoint import Dtypes, Wanted
from .diffusers_layout import MARK, OWN_SCHEDULER
from .load import load_pipeline, locate
from .single_files import SingleFiles, path_of, with_parts_of

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on


class LoadablePipeline(DiffusionPipeline):
    """Base of the pipelines: what they are made from, and how they are saved."""

    hub_class_name: str  # the diffusers pipeline that a subclass stands for
    checkpoint_kinds: tuple[str, ...]  # what it runs, in the words of the checkpoints' configurations
    provenance: Provenance

    @abstractmethod
    def check_components(self) -> None:
        """Refuse components that do not belong together, or settings that do not suit them."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        memory: str | float | Mapping[str, Any] | None = None,
        quantize: str | Quantization | None = None,
        parallel: str | Mapping[str, Any] | None = None,
        loras: Any = (),
        dtype: Dtypes = None,
        dequantize: bool = False,
        prepare: str | None = None,
        **options: Any,
    ) -> "Self":
        """Load a pipeline from a folder or a hub repository, in the Diffusers or the official layout.

        Args:
            pretrained_model_name_or_path: folder, or repository such as "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
                or "Wan-AI/Wan2.2-T2V-A14B".
            memory: "auto", or what of a GPU's memory may be used, such as "12GB", or a dict with arguments of
                `fit`: "vram", "ram", and sizes. The first call finds the fastest way to make its video in it
                (`wan22.accel.plan`) and applies it; a larger one finds another. With a size that is done at
                once. Weights in another dtype are converted as they are used, and stay in their files.
            quantize: how to quantise the transformers, which changes the result: "fp8", "fp8:low:keep=1", or
                `wan22.Quantization`; see `quantize`.
            parallel: "auto": under torchrun all ranks make one video together, each on its own GPU, in the
                layout that moves the least, with divided weights where whole ones would not fit; started as
                one process, it goes to its GPU. Or arguments of `wan22.accel.parallel.parallelize`.
            loras: a LoRA, or a list of them: files, folders, repositories, tables of tensors, or dicts with
                arguments of `load_lora_weights`.
            dtype: dtype of all components, or a dict by component and "default"; None: as stored.
            dequantize: whether to expand quantised weights.
            prepare: "bf16" or "fp8": transformers and text encoder are converted once, into the cache (see
                `wan22 prepare --help`), and loaded from there, now and whenever a load in bfloat16 would
                convert them, with the same result. "fp8" is as `quantize="fp8"` makes the transformers.
            **options: any component, ready made, or None to leave it out. The hub's `revision`, `cache_dir`,
                `token`, `local_files_only`, `force_download`. In the Diffusers layout also those of
                diffusers' loader, such as `variant`, `device_map`, `quantization_config`.

        Raises:
            FileNotFoundError: there is no such folder, or something is missing in it.
            ValueError: it is a checkpoint for another pipeline, holds weights that have no place, or a
                setting or a combination of components is not supported; nothing fits into the memory, said
                before weights are downloaded or read; or the work cannot be shared as asked.
            TypeError: there is no such argument.
        """
        check_names(cls.from_pretrained, options)
        wanted = Wanted.of(cls, dtype, dequantize, options)
        hub = {name: options[name] for name in OPTIONS & options.keys()}
        checkpoint = locate(str(pretrained_model_name_or_path), hub)
        return load_pipeline(cls, checkpoint, wanted, memory, quantize, parallel, loras, prepare)

    @classmethod
    def from_single_file(
        cls,
        high: str | Path | None = None,
        low: str | Path | None = None,
        *,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        image_encoder: Any = None,
        memory: str | float | Mapping[str, Any] | None = None,
        quantize: str | Quantization | None = None,
        parallel: str | Mapping[str, Any] | None = None,
        loras: Any = (),
        dtype: Dtypes = None,
        dequantize: bool = False,
        prepare: str | None = None,
        **options: Any,
    ) -> "Self":
        """Load a pipeline from single files, each of any format; see WanTransformer3DModel.from_single_file.

        Files are paths, or addresses on the hub. What is not given is taken from the first file if it holds
        several models, as ComfyUI saves them.

        Args:
            high: file of the high-noise expert, or the only transformer. In diffusers:
                pretrained_model_link_or_path.
            low: file of the low-noise expert.
            vae: file, or model.
            text_encoder: file, or model; None if prompt_embeds are given at every call.
            tokenizer: folder or repository, such as "google/umt5-xxl"; or tokenizer.
            image_encoder: file, or model (Wan 2.1 for images).
            memory, quantize, parallel, loras: as in from_pretrained.
            dtype: as in from_pretrained; bfloat16 by default for quantised weights.
            dequantize: whether to expand those.
            prepare: as in from_pretrained.
            **options: further components and settings of the pipeline, such as `scheduler` or
                `boundary_ratio`; default are those of the released checkpoint with the same shapes.
                `attention_head_dim`, if it is not 128. The hub's options, and those of diffusers that
                WanTransformer3DModel.from_single_file takes, such as `config` and `device`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file cannot be read or is another model's, or the components do not belong together;
                nothing fits into the memory; the work cannot be shared as asked; or an argument asks for what
                cannot be done.
            TypeError: there is no such argument.
        """
        check_names(cls.from_single_file, options, (*DIFFUSERS_NAMES, "attention_head_dim"))
        if options.keys() & set(ALIASES):
            high = only_source(high, options)
        given = Arguments.of(dtype, options, "transformer")
        parts = {"transformer": high, "transformer_2": low, "vae": vae, "text_encoder": text_encoder}
        parts |= {"tokenizer": tokenizer, "image_encoder": image_encoder}
        paths = {name: path_of(name, p, given) for name, p in parts.items() if isinstance(p, str | Path)}
        models = {name: part for name, part in parts.items() if name not in paths and part is not None}
        if tables := [name for name, part in models.items() if isinstance(part, Mapping)]:
            raise TypeError(f"{tables[0]} is a table of tensors; give the model, of its own from_single_file")
        if "transformer" in paths:
            absent = set(signature_keys(cls)[0]) - models.keys()
            paths = with_parts_of(paths["transformer"], paths, absent)
        wanted = Wanted.of(cls, given.dtype, dequantize, {**given.others, **models})
        files = SingleFiles(paths, reference=given.reference)
        pipe = load_pipeline(cls, files, wanted, memory, quantize, parallel, loras, prepare)
        return pipe if given.device is None else pipe.to(given.device)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "Self":
        """Build this pipeline from another one's components, ours or diffusers', sharing their weights.

        `kwargs` are components and settings that replace the other's. Nothing is cast without a `dtype` (or
        `torch_dtype`), which all components then get, those of the other pipeline, too.
        """
        asked = kwargs.pop("torch_dtype", None)
        dtype = read_dtype(kwargs.pop("dtype", None) or asked)
        components, settings = signature_keys(cls)
        names = [*components, *settings]
        refuse_unknown(f"{cls.__name__}.from_pipe", kwargs, {*names, "dtype", "torch_dtype"})
        known = {**pipeline.config, **pipeline.components, **kwargs}
        pipe = cls(**{name: value for name, value in known.items() if name in names})
        pipe.check_components()
        pipe.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        if isinstance(pipeline, LoadablePipeline):
            pipe.provenance.copy_from(pipeline.provenance)
        return pipe if dtype is None else pipe.to(dtype=dtype)

    @classmethod
    def from_diffusers_folder(cls, folder: Path, **options: Any) -> Any:
        """Load a folder in the Diffusers layout as diffusers does, with our classes."""
        with loading_bars():
            return super().from_pretrained(folder, **options)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Read model_index.json; what we have a class for is looked up here instead of in diffusers.

        That goes for the pipeline, too: diffusers would import its own of this name, to no end.
        """
        loaded = super().load_config(*args, **kwargs)
        config, *rest = loaded if isinstance(loaded, tuple) else (loaded,)
        # TI2V-5B may name, as absent, what only the other pipeline could have.
        known = {name for names in signature_keys(cls) for name in names}
        config = {n: _with_our_class(v) for n, v in config.items() if v != [None, None] or n in known}
        config["_class_name"] = cls.__name__
        return (config, *rest) if rest else config

    @classmethod
    def _get_signature_types(cls) -> dict[str, Any]:
        # Empty annotations skip diffusers' own type warnings: models of both families are taken.
        names = list(inspect.signature(cls.__init__).parameters)[1:]  # without self
        return dict.fromkeys(names, (inspect.Signature.empty,))

    def save_pretrained(self, *args: Any, merge_lora: bool = False, **kwargs: Any) -> None:
        """Save all components, as diffusers does, with ordinary weights; see the models' method."""
        check_saving(super().save_pretrained, kwargs)
        models = [m for name in ("transformer", "transformer_2") if (m := getattr(self, name)) is not None]
        with plain_state(models, merge_lora):
            super().save_pretrained(*args, **kwargs)

    def to_json_string(self) -> str:
        """Write model_index.json with diffusers' names."""
        config = json.loads(super().to_json_string())
        for name, value in config.items():
            if isinstance(value, list) and len(value) == 2 and str(value[0]).split(".")[0] == "wan22":
                config[name] = ["diffusers", value[1]]
        entry, own = hub_classes.saved_scheduler(self.scheduler)
        config |= {"scheduler": entry or config["scheduler"], OWN_SCHEDULER: own}
        config |= {"_class_name": self.hub_class_name, MARK: __version__}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _with_our_class(entry: Any) -> Any:
    """Return an entry of model_index.json, with our class in place of diffusers' where there is one."""
    ours = isinstance(entry, list | tuple) and len(entry) == 2 and entry[0] == "diffusers"
    return [hub_classes.__name__, entry[1]] if ours and entry[1] in hub_classes.__all__ else entry
