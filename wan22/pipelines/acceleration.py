"""What makes a pipeline faster, or its weights smaller, switched on and off by one line each."""

from abc import abstractmethod
from typing import Any

from ..accel import attention
from ..accel import vae as vae_acceleration
from ..accel.compile import Compiled
from ..accel.parallel import Parallel
from ..accel.quantize import check, check_method, is_quantized, quantize
from ..models.attention import computing_backend
from ..models.transformer import WanAttention
from .loading.pipeline import LoadablePipeline


class AcceleratedPipeline(LoadablePipeline):
    """Compilation, quantisation and attention kernels of a pipeline's models."""

    transformers: list[Any]
    any_transformer: Any
    vae: Any
    _compiled: Compiled | None = None
    _accelerated = False
    _parallel: Parallel | None = None

    @property
    def parallel(self) -> Parallel | None:
        """The ranks that share this pipeline's work, see `wan22.accel.parallel.parallelize`."""
        return self._parallel

    def computed_on(self) -> str:
        """Return what computes, for recipes: the device, and the ranks."""
        device = super().computed_on()
        return device if self._parallel is None else f"{device}, {self._parallel}"

    @abstractmethod
    def come_home(self) -> None:
        """Let all models be where they are when the pipeline rests."""

    @abstractmethod
    def settle(self) -> None:
        """Let all models go home before their weights are changed."""

    # ---- compilation ----

    @property
    def compiled(self) -> Compiled | None:
        """What `compile` attached, or None."""
        return self._compiled

    def compile(self, vae: bool = True, **options: Any) -> None:
        """Compile the transformers' repeated block, once for all layers and experts, and the VAE's chunks.

        Compiling happens in the next call, in the first one at another size, and when a LoRA's strength first
        changes; calls with another prompt and the other expert use what there is. Decoding in strips, and the
        chunks of an image's condition that leave out what would repeat itself, run as they are; so does a VAE
        whose rows are shared among ranks.

        Args:
            vae: whether to compile the VAE, too.
            **options: of torch.compile, such as `mode="max-autotune-no-cudagraphs"` or `backend`. CUDA graphs
                cannot run block by block.

        Raises:
            ValueError: the options ask for CUDA graphs, or something else has replaced a block's forward.
        """
        self.uncompile()
        vae = vae and not (self._parallel is not None and self._parallel.shares_rows)
        self._compiled = Compiled(self.transformers, self.vae if vae else None, **options)

    def uncompile(self) -> None:
        """Run as before `compile`, to the bit.

        Raises:
            ValueError: a block's forward has been replaced since, by a step cache say.
        """
        if self._compiled is not None:
            self._compiled.detach()
            self._compiled = None

    # ---- kernels and weights ----

    def accelerate(self) -> None:
        """Compute the same faster: results move by rounding, see `accel.vae` for the bounds.

        The VAE works with channels innermost in memory, and upsamples inside a convolution; the attention
        kernel is the fastest exact one. Weights that are loaded later need it again, and so do
        models that run elsewhere later: on a GPU in place of the CPU.
        """
        self.come_home()
        vae_acceleration.accelerate(self.vae)
        if self.transformers:
            self.set_attention_backend("auto")
        self._accelerated = True

    def decelerate(self) -> None:
        """Undo `accelerate`, to the bit."""
        self.come_home()
        vae_acceleration.detach(self.vae)
        for model in self.transformers:
            model.set_attention_backend("native")
        self._accelerated = False

    def set_attention_backend(self, backend: str = "auto") -> str:
        """Choose the kernel that computes attention in all transformers, after trying it.

        Args:
            backend: "auto" is the fastest exact one for the device; or a name of
                `wan22.accel.attention.available()`.

        Returns: the name of the one that is used.

        Raises:
            ValueError: it is not available here, or its results are wrong; or there is no transformer.
        """
        models = self.transformers or [self.any_transformer]  # which says that there is none
        return [attention.use(model, backend) for model in models][-1]

    def quantize(self, method: Any) -> None:
        """Quantise the transformers' large linear layers, in place; that changes the result.

        Args:
            method: "fp8", "int8", "fp8_dynamic", or a configuration of torchao's; see
                `wan22.accel.quantize.quantize`. What is quantised already stays as it is.

        Raises:
            ValueError: the method is unknown, or a model cannot be quantised as it is.
        """
        check_method(method)
        models = [model for model in self.transformers if not is_quantized(model)]
        for model in models:
            check(model, method)
        self.settle()
        for model in models:
            quantize(model, method)
        self.settle()  # lets go of the weights that were replaced

    def changes(self) -> dict[str, Any]:
        """Return what moves results away from those of the plain models, by rounding or by more."""
        modules = [module for model in self.transformers for module in model.modules()]
        kernels = {computing_backend(m.backend) for m in modules if isinstance(m, WanAttention)}
        models = {
            name: getattr(self, name, None) for name in ("text_encoder", "transformer", "transformer_2")
        }
        found = {
            "attention": tuple(sorted(kernels - {"native"})),
            "quantized": tuple(name for name, m in models.items() if m is not None and is_quantized(m)),
            "accelerated": self._accelerated,
            "compiled": self.compiled is not None,
            "tiled": self.vae.use_tiling,
        }
        return {what: value for what, value in found.items() if value}
