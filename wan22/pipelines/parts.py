"""What a pipeline consists of: its components, and the parts that it holds and offers by one line each."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.video_processor import VideoProcessor

from ..checkpoints.loading.dtypes import read_device
from ..checkpoints.loading.models import OWN_MODELS, AutoencoderKLWan, WanTransformer3DModel, is_ours
from ..checkpoints.quantized_linear import check_has_float8
from ..checks import check_num_frames, check_real, check_size, refuse_unknown, shown
from ..notebooks import table
from ..presets import TI2V_5B, Preset, closest_preset, find_preset
from ..private_apis import uncompiled
from ..progress import progress_bar
from .attached import summary
from .attached.acceleration import Acceleration
from .attached.calls import Calls
from .attached.loras import Loras
from .attached.memory import Memory
from .attached.part import Part
from .attached.provenance import Provenance
from .attached.ranks import OneRank, Ranks
from .call.autoencoders import spatial_stride, temporal_stride
from .call.request import Request
from .call.text import check_tokenizer
from .diffusers_names import DiffusersNames

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

    from ..accel.compile import Compiled
    from ..accel.parallel import Parallel
    from ..accel.planning.plans import Plan

logger = logging.getLogger(__name__)

# What dir() names of diffusers' methods.
_OF_DIFFUSERS = {
    *("components", "config", "device", "dtype", "enable_group_offload", "enable_model_cpu_offload"),
    *("enable_sequential_cpu_offload", "push_to_hub", "save_lora_weights", "set_progress_bar_config"),
}

P = ParamSpec("P")
Result = TypeVar("Result")


def delegate(
    part: str, method: Callable[Concatenate[Any, P], Result], changing: bool = True
) -> Callable[Concatenate[Any, P], Result]:
    """Return a method that calls one of a part that the pipeline holds, with its signature and docstring.

    Where it is `changing` the models, the calls of other threads end before, or begin after it.
    """

    @wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> Result:
        with self.calls.using_models(changing=True) if changing else nullcontext():
            return method(getattr(self, part), *args, **kwargs)

    return call


class PipelineParts(DiffusersNames, WanLoraLoaderMixin):
    """The components of a pipeline, and what it holds beside them: memory, LoRAs, ranks and others.

    Args:
        tokenizer: umT5's tokenizer.
        text_encoder: UMT5EncoderModel; None if prompt_embeds are given at every call.
        vae: AutoencoderKLWan, ours or diffusers'; None for latents alone, or to encode prompts.
        scheduler: one of `wan22.schedulers`, or any flow-matching scheduler of diffusers; None to encode.
        transformer: the high-noise expert, or the only transformer.
        transformer_2: the low-noise expert. A slot that the schedule never reaches may be None.
        boundary_ratio: `transformer` serves timesteps at or above this share of 1000; None for one
            transformer.
        expand_timesteps: whether the checkpoint takes one timestep per token (TI2V-5B).

    Raises:
        ValueError: the models do not belong together. Whether the settings suit them is checked at each call.
    """

    model_cpu_offload_seq = "text_encoder->transformer->transformer_2->vae"
    _optional_components = ["tokenizer", "text_encoder", "vae", "scheduler", "transformer", "transformer_2"]
    _lora_loadable_modules = ["transformer", "transformer_2"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    vae: AutoencoderKLWan
    tokenizer: Any
    text_encoder: Any
    transformer: WanTransformer3DModel | None
    transformer_2: WanTransformer3DModel | None

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        scheduler: Any,
        transformer: Any = None,
        transformer_2: Any = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        super().__init__()
        self.memory, self.acceleration, self.loras = Memory(self), Acceleration(self), Loras(self)
        self.provenance, self.calls = Provenance(self), Calls(self)
        self.ranks: Ranks = OneRank()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=transformer,
            transformer_2=transformer_2,
        )
        if boundary_ratio is not None:
            boundary_ratio = check_real("boundary_ratio", boundary_ratio, 0, 1)
        self.register_to_config(boundary_ratio=boundary_ratio, expand_timesteps=expand_timesteps)
        self.check_models()
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy of a pipeline hold parts of its own."""
        self.__dict__.update({n: v.held_by(self) if isinstance(v, Part) else v for n, v in state.items()})

    def __setattr__(self, name: str, value: Any) -> None:
        """Take a component as it is; the log tells of a model of diffusers."""
        super().__setattr__(name, value)
        if name in OWN_MODELS and value is not None and not is_ours(value):
            kind = type(uncompiled(value))
            message = "%s is %s of %s: it runs as it is, with that library's arithmetic"
            logger.info(message, name, kind.__name__, kind.__module__.partition(".")[0])

    def __repr__(self) -> str:
        """Describe what is loaded and attached, in lines."""
        rows = summary.rows(self)
        width = max(len(name) for name, _ in rows)
        return "\n".join([summary.title(self), *(f"  {name:{width}}  {text}" for name, text in rows)])

    def _repr_html_(self) -> str:
        """Describe the same as a table, for notebooks."""
        return table(summary.title(self), summary.rows(self))

    def __dir__(self) -> list[str]:
        """Name what wan22 documents, and of diffusers' methods those that do something for Wan."""
        ours = (vars(cls) for cls in type(self).__mro__ if cls.__module__.startswith("wan22."))
        names = {*vars(self), *self.components}.union(_OF_DIFFUSERS, *ours)
        return sorted(name for name in names if name[0] != "_")

    # ---- what the components are ----

    @property
    def transformers(self) -> list[WanTransformer3DModel]:
        """The loaded transformers, high noise first."""
        return [model for model in (self.transformer, self.transformer_2) if model is not None]

    @property
    def any_transformer(self) -> WanTransformer3DModel:
        """A loaded transformer; both slots have the same configuration."""
        if not self.transformers:
            raise ValueError("neither transformer nor transformer_2 is loaded; a video needs at least one")
        return self.transformers[0]

    @property
    def released(self) -> Preset | None:
        """The released checkpoint that the loaded configs belong to; None if that cannot be told."""
        if not self.transformers:
            return None
        config = self.any_transformer.config
        return find_preset(
            dim=config.num_attention_heads * config.attention_head_dim,
            in_channels=config.in_channels,
            experts=self._experts,
            two_frames=config.pos_embed_seq_len is not None,
        )

    @property
    def preset(self) -> Preset:
        """Facts and recipe of the loaded checkpoint; for an unknown one, of its closest relative."""
        models = self.transformers
        in_channels = models[0].config.in_channels if models else self.latent_channels
        return self.released or closest_preset(in_channels=in_channels, experts=self._experts)

    @property
    def _experts(self) -> int:
        """Transformers of the checkpoint, whether or not both are loaded."""
        return 1 if self.config.boundary_ratio is None else 2

    @property
    def checkpoint_name(self) -> str:
        """The released checkpoint's name, or the source of an unknown one."""
        released = self.released
        return released.name if released else str(self.config.get("_name_or_path") or "unnamed checkpoint")

    def check_components(self) -> None:
        """Refuse components that do not belong together, or settings that do not suit them."""
        if self.config.boundary_ratio is None and self.transformer_2 is not None:
            raise ValueError(
                "transformer_2 is given but boundary_ratio is None; give the boundary, 0.875 for T2V-A14B: "
                "pipe.register_to_config(boundary_ratio=0.875)"
            )
        self.check_models()

    def check_models(self) -> None:
        """Refuse models that belong together under no settings."""
        check_tokenizer(self.tokenizer, self.text_encoder)
        if self.vae is None:
            return
        kinds = {kind.__name__ for kind in type(uncompiled(self.vae)).__mro__}  # diffusers' has the name, too
        if AutoencoderKLWan.__name__ not in kinds or not hasattr(self.vae, "config"):
            raise ValueError(f"vae must be an AutoencoderKLWan, not {type(self.vae).__name__}")
        for model in self.transformers:
            if model.config.out_channels != self.vae.config.z_dim:
                raise ValueError(
                    f"the transformer predicts {model.config.out_channels} latent channels, the VAE has "
                    f"{self.vae.config.z_dim}; they are of different checkpoints"
                )

    def check_width(self, encoder: str, setting: str) -> None:
        """Refuse an encoder whose embeddings are not as wide as the setting of the transformers' says."""
        # A class of the caller's own need not say its width.
        width = getattr(getattr(getattr(self, encoder, None), "config", None), "hidden_size", None)
        for model in self.transformers:
            taken = model.config.get(setting)
            if None not in (width, taken) and width != taken:
                raise ValueError(
                    f"the {encoder} gives embeddings {shown(width)} wide, the transformer takes {taken} "
                    f"({setting}); they are of different checkpoints"
                )

    def check_vae(self, what: str, otherwise: str = "") -> None:
        """Refuse what needs the VAE where there is none."""
        if self.vae is None:
            advice = f"load it; {otherwise}" if otherwise else "load it"
            raise ValueError(f"pipe.vae is None, and {what} needs it; {advice}")

    @property
    def vae_scale_factor_temporal(self) -> int:
        """Frames per latent frame; without a VAE 4, as all of Wan's have it."""
        return 4 if self.vae is None else temporal_stride(self.vae)

    @property
    def vae_scale_factor_spatial(self) -> int:
        """Pixels per latent row and column; without a VAE 16 for TI2V-5B's latents, where diffusers has 8."""
        if self.vae is None:
            return 16 if self.latent_channels == TI2V_5B.in_channels else 8
        return spatial_stride(self.vae)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, the VAE's or the transformer's; 16 without either."""
        if self.vae is not None:
            return self.vae.config.z_dim
        return self.transformers[0].config.out_channels if self.transformers else 16

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return one video's latent shape "c t h w"."""
        stride = self.vae_scale_factor_spatial
        frames = 1 + (num_frames - 1) // self.vae_scale_factor_temporal
        return self.latent_channels, frames, height // stride, width // stride

    def token_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the transformer's tokens along frames, rows and columns, for a size in pixels."""
        _, t, h, w = self.latent_shape(num_frames, height, width)
        frames, rows, columns = self.any_transformer.config.patch_size
        return t // frames, h // rows, w // columns

    def checked_latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the latent shape "c t h w" of a size that has whole cells; others are refused."""
        check_size("height", height, self.vae_scale_factor_spatial)
        check_size("width", width, self.vae_scale_factor_spatial)
        check_num_frames(num_frames, self.vae_scale_factor_temporal)
        return self.latent_shape(num_frames, height, width)

    # ---- what the tasks decide ----

    def prompt_count(self, request: Request) -> int | None:
        """Return the number of prompts that there must be, if something else of the request says so."""
        return None

    def default_size(self, request: Request) -> tuple[int, int]:
        """Return the height and width of a call that gives none."""
        return self.preset.height, self.preset.width

    def followed_area(self, request: Request) -> int | None:
        """Return the pixels that height times width may have, if the size follows images."""
        return None

    def draw_seed(self) -> int:
        """Draw the seed of a call that gives none from torch's default generator, one for all ranks."""
        return self.ranks.agreed(int(torch.randint(2**32, ())))

    def run_metadata(self) -> dict[str, Any]:
        """Return a recipe's entries about the pipeline, beside the call's settings."""
        return self.provenance.run_metadata()

    # ---- memory ----

    fit = delegate("memory", Memory.fit)
    apply = delegate("memory", Memory.apply)
    release = delegate("memory", Memory.release)
    offload_all = delegate("memory", Memory.offload_all)

    @property
    def memory_plan(self) -> "Plan | None":
        """The plan that is applied."""
        return self.memory.plan

    def to(self, *args: Any, **kwargs: Any) -> "Self":
        """Move or cast all models, as DiffusionPipeline.to does; refused where a plan moves them.

        `torch_dtype` is the older name of `dtype`; a TypeError names any other argument.
        """
        refuse_unknown("pipe.to", kwargs, {"device", "dtype", "torch_dtype", "silence_dtype_warnings"})
        if (older := kwargs.pop("torch_dtype", None)) is not None:
            kwargs.setdefault("dtype", older)
        asked = (kwargs.get(name) for name in ("device", "dtype"))
        for place in (*args, kwargs.get("device")):
            if isinstance(place, str | torch.device):
                device = read_device(place)
                for model in self.components.values():
                    if isinstance(model, torch.nn.Module):
                        check_has_float8(model, device)
        with self.calls.using_models(changing=True):
            self.memory.check_movable(*args, *(value for value in asked if value is not None))
            return super().to(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save all components, as diffusers does; quantised weights are expanded, divided ones refused."""
        self.ranks.check_whole()
        with self.calls.using_models(changing=True):  # expanding, and back
            super().save_pretrained(*args, **kwargs)

    def free(self) -> None:
        """Give all memory back to the system; the pipeline has no weights afterwards and cannot run."""
        with self.calls.using_models(changing=True, freeing=True):
            if self.parallel is not None:
                self.parallel.detach()
            self.release()
            self.uncompile()
            self.decelerate()
            self.memory.free()

    def maybe_free_model_hooks(self) -> None:
        """Leave the device as it is to be between calls."""
        super().maybe_free_model_hooks()  # resets step caches, too
        self.memory.end_call()

    # ---- speed, ranks, LoRAs ----

    compile = delegate("acceleration", Acceleration.compile)
    uncompile = delegate("acceleration", Acceleration.uncompile)
    accelerate = delegate("acceleration", Acceleration.accelerate)
    decelerate = delegate("acceleration", Acceleration.decelerate)
    set_attention_backend = delegate("acceleration", Acceleration.set_attention_backend)
    quantize = delegate("acceleration", Acceleration.quantize)

    @property
    def compiled(self) -> "Compiled | None":
        """What `compile` attached, or None."""
        return self.acceleration.compiled

    @property
    def parallel(self) -> "Parallel | None":
        """The ranks that share this pipeline's work, see `wan22.accel.parallel.parallelize`."""
        return None if isinstance(self.ranks, OneRank) else cast("Parallel", self.ranks)

    load_lora_weights = delegate("loras", Loras.load_lora_weights)
    unload_lora_weights = delegate("loras", Loras.unload_lora_weights)
    set_adapters = delegate("loras", Loras.set_adapters)
    get_list_adapters = delegate("loras", Loras.get_list_adapters, changing=False)
    get_active_adapters = delegate("loras", Loras.get_active_adapters, changing=False)
    delete_adapters = delegate("loras", Loras.delete_adapters)
    disable_lora = delegate("loras", Loras.disable_lora)
    enable_lora = delegate("loras", Loras.enable_lora)
    fuse_lora = delegate("loras", Loras.fuse_lora)
    unfuse_lora = delegate("loras", Loras.unfuse_lora)
    set_lora_device = delegate("loras", Loras.set_lora_device)
    enable_lora_hotswap = delegate("loras", Loras.enable_lora_hotswap)

    @property
    def fused_loras(self) -> set[str]:
        """The adapters that are in the weights."""
        return self.loras.fused_names()

    @property
    def num_fused_loras(self) -> int:
        """The number of adapters that are in the weights."""
        return len(self.fused_loras)

    # ---- progress ----

    def progress_bar(self, iterable: Any = None, total: int | None = None, **options: Any) -> Any:
        """Return a progress bar with the settings of `set_progress_bar_config`; the first rank's is drawn."""
        settings = getattr(self, "_progress_bar_config", {})
        hidden = {} if self.ranks.first else {"disable": True}
        return progress_bar(iterable, total, **options | settings | hidden)
