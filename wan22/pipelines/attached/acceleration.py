"""What makes a pipeline's models faster, or their weights smaller, switched on and off by one line each."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ...accel import attention
from ...accel import vae as vae_acceleration
from ...accel.planning.meta_models import MODELS
from ...accel.quantization.layers import formats_of, needs_quantizing
from ...accel.quantization.settings import Quantization
from ...accel.quantize import check, check_memory, quantize
from ...checkpoints.loading.attention_names import our_name
from ...checkpoints.loading.diffusers_attention import WanAttnProcessor
from ...checkpoints.loading.models import OWN_MODELS, is_ours
from ...checkpoints.lora.casting import is_narrow
from ...devices import can_compile
from ...few_steps import SLOTS
from ...models.attention import computing_backend
from ...models.attention_layer import WanAttention
from ...private_apis import (
    active_attention_backend,
    attention_backend_of,
    cache_config,
    is_compiled,
    layerwise_casting,
    uncompiled,
)
from ...progress import bytes_bar
from ..call.request import plain
from .part import Part

if TYPE_CHECKING:
    from ...accel.compile import Compiled

logger = logging.getLogger(__name__)


class Acceleration(Part):
    """Compilation, quantisation and attention kernels of a pipeline's models."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.compiled: Compiled | None = None
        self.accelerated = False

    # ---- compilation ----

    def compile(self, vae: bool = False, **options: Any) -> None:
        """Compile the transformers' repeated block, once for all layers and experts.

        Compiling happens in the next call, in the first one at another size, and when a LoRA's strength first
        changes; calls with another prompt and the other expert use what there is. Not compiled are a VAE
        that works in strips, or whose rows are shared among ranks, and the chunks of an image's condition
        that leave out what would repeat itself. Without it, a GPU computes the same in fused pieces, see
        `models.fused`, of which each compiles in seconds.

        Args:
            vae: whether to compile the VAE's chunks, too: minutes, which save less than a second a clip.
            **options: arguments of torch.compile, such as `mode="max-autotune-no-cudagraphs"` or `backend`.

        Raises:
            ValueError: the options ask for CUDA graphs, which cannot run block by block, or something else
                has replaced a block's forward; the VAE, asked for, is not wan22's; or there is nothing to
                compile.

        On a GPU without Triton, as on Windows, nothing is compiled, with a warning.
        """
        pipe = self._pipe
        device = pipe._execution_device
        if options.get("backend", "inductor") == "inductor" and not can_compile(device):
            logger.warning("nothing is compiled: for %s that takes Triton, which is not there", device.type)
            return
        if vae and not is_ours(pipe.vae):
            raise ValueError("pipe.vae is not wan22's, whose chunks alone are compiled; leave vae=True out")
        from ...accel.compile import Compiled

        vae = vae and not pipe.ranks.shares_rows
        transformers = pipe.transformers if vae else self._transformers()
        self.uncompile()
        self.compiled = Compiled(transformers, pipe.vae if vae else None, **options)

    def uncompile(self) -> None:
        """Undo `compile`, to the bit; refused if a step cache or the like has replaced a forward since."""
        if self.compiled is not None:
            self.compiled.detach()
            self.compiled = None

    # ---- kernels and weights ----

    def accelerate(self) -> None:
        """Compute the same faster: results move by rounding, see `accel.vae` for the bounds.

        The VAE works with channels innermost in memory, and upsamples inside a convolution; the attention
        kernel is the fastest exact one. Call it again after loading other weights or moving to a GPU.
        """
        pipe = self._pipe
        if pipe.memory.moves_models:
            pipe.memory.offload_all()
        if pipe.vae is not None:
            vae_acceleration.accelerate(pipe.vae)
        if pipe.transformers:
            self.set_attention_backend("auto")
        self.accelerated = True

    def decelerate(self) -> None:
        """Undo `accelerate`, to the bit."""
        pipe = self._pipe
        if pipe.memory.moves_models:
            pipe.memory.offload_all()
        if is_ours(pipe.vae):
            vae_acceleration.detach(pipe.vae)
        for model in pipe.transformers:
            model.reset_attention_backend()
        self.accelerated = False

    def set_attention_backend(self, backend: str = "auto") -> str:
        """Try an attention kernel, use it in all transformers, and return its name.

        Args:
            backend: name in `wan22.accel.attention.available()`; "auto" is the device's fastest exact one.

        Raises:
            ValueError: it is not available here, or its results are wrong; or there is no transformer.
        """
        return [attention.use(model, backend) for model in self._transformers()][-1]

    def quantize(
        self, method: Any, block: int | None = None, only: str | None = None, keep_blocks: Any = None
    ) -> None:
        """Quantise the transformers' large linear layers, in place; that changes the result.

        Args:
            method: "fp8", "int8", "fp8_dynamic", or a configuration of torchao's; see
                `wan22.accel.quantize.quantize`. A transformer that is quantised so already stays as it is.
                Or all settings in one, `wan22.Quantization`, or its text, such as "fp8:low:keep=1".
            block: inputs that share a scale, for "fp8" and "int8"; default is all inputs of an output.
            only: "high" or "low" for that expert alone; another call may quantise the other one in another
                way. Default is both.
            keep_blocks: how many of the first and of the last blocks stay in full precision, (1, 2), or a
                number for both; default is none.

        Raises:
            ValueError: the method is unknown, no transformer is loaded, or not the one that is asked for, or
                one cannot be quantised as it is, or is quantised in another way.
            MemoryError: the host has no room for the quantised weights. Nothing is quantised then.
        """
        settings = Quantization.of(method, block=block, only=only, keep_blocks=keep_blocks)
        self._transformers()  # says if there is none
        loaded = [slot for slot in SLOTS if getattr(self._pipe, slot) is not None]
        chosen, settings = settings.slots(loaded), settings.of_a_model
        models = [m for slot in chosen if needs_quantizing(m := getattr(self._pipe, slot), settings)]
        self._pipe.memory.offload_all()
        check_memory(check(model, settings) for model in models)
        # No list of the layers: it would keep the weights that are replaced.
        nbytes = sum(sum(layer.weight.nbytes for layer in check(m, settings).values()) for m in models)
        with bytes_bar(nbytes, "quantizing", **getattr(self._pipe, "_progress_bar_config", {})):
            for model in models:
                quantize(model, settings)
        self._pipe.memory.offload_all()  # drops the weights that were replaced

    def _transformers(self) -> list[Any]:
        """Return the loaded transformers; a ValueError says that there is none."""
        return self._pipe.transformers or [self._pipe.any_transformer]

    def changes(self) -> dict[str, Any]:
        """Return what moves results away from those of the plain models, by rounding or by more.

        Of what has settings, such as quantisation, tiling and step caches, the settings.
        """
        pipe = self._pipe
        models = {name: model for name in MODELS if (model := getattr(pipe, name, None)) is not None}
        quantizable = [name for name in models if name not in ("vae", "image_encoder")]
        found = {
            "attention": tuple(sorted(self._kernels() - {"native"})),
            "quantized": _by_model({name: formats_of(models[name]) for name in quantizable}),
            "cast": _by_model({name: _narrow_dtypes(model) for name, model in models.items()}),
            "accelerated": self.accelerated,
            "compiled": self.compiled is not None or any(map(is_compiled, models.values())),
            "of_diffusers": tuple(n for n in models if n in OWN_MODELS and not is_ours(models[n])),
            "step_cache": self._step_caches(),
            "tiled": _tiles(pipe.vae),
            "token_parts": self._token_parts(),
        }
        return {what: value for what, value in found.items() if value}

    def _step_caches(self) -> dict[str, dict[str, Any]]:
        """Return the settings of the transformers' step caches, by the kind of cache and the transformer."""
        found: dict[str, dict[str, Any]] = {}
        for name in SLOTS:
            if (config := cache_config(getattr(self._pipe, name))) is not None:
                settings = {n: str(plain(v)) for n, v in vars(config).items() if not callable(v)}
                found.setdefault(type(config).__name__, {})[name] = settings
        return found

    def _token_parts(self) -> int | None:
        """Return in how many parts blocks compute the tokens; None: in one."""
        blocks = (block for model in self._pipe.transformers for block in uncompiled(model).blocks)
        parts = max((getattr(block, "token_chunks", 1) for block in blocks), default=1)
        return parts if parts > 1 else None

    def _kernels(self) -> set[str]:
        """Return the names of all transformers' attention kernels, and of processors of a caller."""
        kernels = {our_name(active_attention_backend(), wanted=False)}
        for module in (module for model in self._pipe.transformers for module in model.modules()):
            if isinstance(module, WanAttention):
                processor = getattr(module, "processor", None)
                given = processor is not None and type(processor) is not WanAttnProcessor
                kernels.add(type(processor).__name__ if given else computing_backend(module.backend))
            elif (name := attention_backend_of(module)) is not None:
                kernels.add(our_name(name, wanted=False))
        return kernels


def _by_model(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the tables that are not empty."""
    return {name: dict(table) for name, table in found.items() if table}


def _narrow_dtypes(model: nn.Module) -> dict[str, int]:
    """Return the number of layers that layerwise casting stores in each dtype."""
    narrow = (str(layerwise_casting(layer).storage_dtype) for layer in model.modules() if is_narrow(layer))
    return dict(Counter(dtype.removeprefix("torch.") for dtype in narrow))


def _tiles(vae: Any) -> dict[str, int] | None:
    """Return the sizes and strides in pixels of the tiles that the VAE works in; None: it has no tiles."""
    if vae is None or not vae.use_tiling:
        return None
    names = (f"{what}_{side}" for what in ("min", "stride") for side in ("height", "width"))
    return {name: int(getattr(vae, f"tile_sample_{name}")) for name in names}
