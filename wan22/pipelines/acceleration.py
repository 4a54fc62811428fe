"""What makes a pipeline faster or smaller, switched on and off by one line each."""

import inspect
import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from ..accel import attention
from ..accel import cpu as cpu_acceleration
from ..accel import vae as vae_acceleration
from ..accel.compile import Compiled
from ..accel.offload.devices import CudaDevice, Device
from ..accel.offload.residence import Residence, free
from ..accel.parallel import Parallel, parallelize, processes
from ..accel.parallel.environment import launched
from ..accel.planning.plans import Plan as MemoryPlan
from ..accel.planning.skeletons import MODELS
from ..accel.quantize import check, check_method, is_quantized, quantize
from ..checkpoints.adapters import adapters_of, has_adapters
from ..models.attention import computing_backend
from ..models.transformer import WanAttention
from .experts import Expert
from .files import FilesPipeline
from .outlines import outline

logger = logging.getLogger(__name__)

# More save no memory: what the layers remember of earlier frames is then the larger part.
MOST_STRIPS = 4
# Of what a plan is made for, what each call has of its own.
_OF_A_CALL = ("height", "width", "num_frames", "prompts", "videos")


class AcceleratedPipeline(FilesPipeline):
    """Compilation, quantisation, attention kernels and the place of a pipeline's models."""

    transformers: list[Any]
    any_transformer: Any
    vae: Any
    _compiled: Compiled | None = None
    _accelerated = False
    _residence: Residence | None = None
    _memory_plan: MemoryPlan | None = None
    _budget: dict[str, Any] | None = None
    _parallel: Parallel | None = None
    _strips_before: int | None = None  # that the VAE decoded in when the plan was applied

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        memory: str | float | None = None,
        quantize: str | None = None,
        parallel: str | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a pipeline as FilesPipeline.from_pretrained does, for the memory and the GPUs that there are.

        Args:
            pretrained_model_name_or_path: folder, or repository.
            memory: "auto", or what of a GPU's memory may be used, such as "12GB": the fastest way to make the
                checkpoint's videos in it is found (`wan22.accel.plan`) and applied; anew for a larger video.
            quantize: how to quantise the transformers, which changes the result; see `quantize`.
            parallel: "auto": under torchrun all ranks make one video together, each on its own GPU, in the
                layout that moves the least, with divided weights where whole ones would not fit; started as
                one process, it goes to its GPU. Or arguments of `wan22.accel.parallel.parallelize`.
            **kwargs: see FilesPipeline.from_pretrained.

        Returns: the pipeline.

        Raises:
            ValueError: nothing fits, there is no GPU, or `parallel` says something else; said before anything
                is loaded. Or the work cannot be shared as asked.
        """
        if parallel is not None:
            together = _shares(parallel)
            if launched():
                processes.join()
                processes.keep_silent()
                if memory is None and quantize is None:
                    dtype, kwargs = transformers_as_stored(kwargs)
                    together = {"dtype": dtype} | together
            pipe = cls.from_pretrained(
                pretrained_model_name_or_path, memory=memory, quantize=quantize, **kwargs
            )
            if launched():
                parallelize(pipe, **together)
            elif pipe.memory_plan is None:
                pipe.to(processes.own_device())
            return pipe
        if memory is None:
            pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            if quantize is not None:
                pipe.quantize(quantize)
            return pipe
        budget = {"vram": None if memory == "auto" else memory, "quantize": quantize}
        cls._check_fits(pretrained_model_name_or_path, budget, kwargs)
        if memory != "auto":
            try:
                CudaDevice()
            except ValueError as error:
                raise ValueError(
                    f"memory={memory!r} is a GPU's, and there is no CUDA device here; memory='auto' plans "
                    "for the CPU"
                ) from error
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        pipe.fit(**budget)
        return pipe

    @property
    def parallel(self) -> Parallel | None:
        """The ranks that share this pipeline's work, see `wan22.accel.parallel.parallelize`."""
        return self._parallel

    def computed_on(self) -> str:
        """Return what computes, for recipes: the device, and the ranks."""
        return ", ".join([super().computed_on(), *([str(self._parallel)] if self._parallel else [])])

    # ---- compilation ----

    @property
    def compiled(self) -> Compiled | None:
        """What `compile` attached; `compiled.seconds` is the time that compiling took so far."""
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
        """Compute the same faster: results move by rounding, see `accel.vae` and `accel.cpu` for the bounds.

        The VAE works with channels innermost in memory; products and convolutions on the CPU are oneDNN's;
        the attention kernel is the fastest exact one. Weights that are loaded later need it again, and so do
        models that run elsewhere later: on a GPU in place of the CPU.
        """
        self._come_home()
        vae_acceleration.accelerate(self.vae)
        for model in (self.vae, *self.transformers):
            cpu_acceleration.accelerate(model)
        if self.transformers:
            self.set_attention_backend("auto")
        self._accelerated = True

    def decelerate(self) -> None:
        """Undo `accelerate`, to the bit."""
        self._come_home()
        vae_acceleration.detach(self.vae)
        for model in (self.vae, *self.transformers):
            cpu_acceleration.detach(model)
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

    # ---- memory ----

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """The plan that is applied."""
        return self._memory_plan

    def fit(
        self, vram: str | float | None = None, ram: str | float | None = None, **options: Any
    ) -> MemoryPlan:
        """Find the fastest way to make videos in a budget, apply it, and do so anew for larger videos.

        Where nothing fits, the plan that was applied before stays.

        Args:
            vram: memory of the device, such as "12GB"; default is what is free.
            ram: memory of the host; default is what is free.
            **options: of `wan22.accel.plan`, such as `height`, `width`, `num_frames`, `quantize`.

        Returns: the plan; print it.

        Raises:
            ValueError: nothing fits.
        """
        from ..accel.planning.planner import plan

        found = plan(self, vram=vram, ram=ram, **options)
        self.apply(found)
        fixed = {name: value for name, value in options.items() if name not in _OF_A_CALL}
        self._budget = {"vram": vram, "ram": ram, **fixed}
        return found

    def apply(self, plan: MemoryPlan, device: Device | None = None) -> None:
        """Keep the models where a plan says, and decode as it says.

        Args:
            plan: of `wan22.accel.plan`, for this pipeline.
            device: where the models run; default is the plan's.

        Raises:
            ValueError: the plan is for another pipeline, it is for a device that is not here, or the models
                are offloaded by somebody else. Nothing is changed but that no plan is applied any more.
        """
        models = {name: getattr(self, name) for name in MODELS if getattr(self, name, None) is not None}
        if missing := [name for name in models if name not in plan.placements]:
            raise ValueError(
                f"the plan for {plan.name} does not say where to keep {missing[0]}; make one for this "
                "pipeline: wan22.accel.plan(pipe)"
            )
        if plan.strips is not None and self.vae.use_tiling:
            raise ValueError(
                f"the plan decodes in {plan.strips} strips, and tiling is enabled; call "
                "pipe.vae.disable_tiling() first"
            )
        if device is None and plan.machine.has_device:
            device = CudaDevice(plan.machine.device)
        self.release()
        residence = None
        if device is not None:
            placed = {name: (model, plan.placements[name]) for name, model in models.items()}
            residence = Residence(placed, device)
        if plan.quantize is not None:
            self.quantize(plan.quantize)
        self._strips_before = self.vae.num_strips if self.vae.use_strips else None
        self._decode_in(plan.strips)
        if residence is not None:
            residence.attach()
        self._residence, self._memory_plan, self._budget = residence, plan, None

    def release(self) -> None:
        """Let go of a plan: all models are on the CPU, as they were before `apply`, to the bit."""
        if self._residence is not None:
            self._residence.detach()
        if self._memory_plan is not None and not self.vae.use_tiling:  # or somebody has decided otherwise
            self._decode_in(self._strips_before)
        self._residence, self._memory_plan, self._budget = None, None, None

    def _decode_in(self, strips: int | None) -> None:
        """Let videos be decoded in strips; None: in whole frames."""
        if strips is None:
            self.vae.disable_strips()
        else:
            self.vae.enable_strips(strips)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast all models, as DiffusionPipeline.to does.

        Raises:
            ValueError: a device is given, and a plan moves the models.
        """
        devices = [a for a in (*args, kwargs.get("device")) if not isinstance(a, torch.dtype | None)]
        if self._in_residence:
            if devices:
                raise ValueError(f"to({devices[0]!r}): the plan moves the models; call pipe.release() first")
            self.settle()
        return super().to(*args, **kwargs)

    def settle(self) -> None:
        """Let all models go home before their weights are changed."""
        self._come_home()

    def _come_home(self) -> None:
        if self._residence is not None:
            self._residence.settle()

    def free(self) -> None:
        """Give all memory back to the system; the pipeline has no weights afterwards and cannot run."""
        if self._parallel is not None:
            self._parallel.detach()
        self.release()
        self.uncompile()
        self.decelerate()
        for model in self.transformers:
            if has_adapters(model):
                adapters_of(model).remove(list(adapters_of(model).strengths))
        free(module for module in self.components.values() if isinstance(module, torch.nn.Module))

    def maybe_free_model_hooks(self) -> None:
        """Leave the device as it is to be between calls."""
        super().maybe_free_model_hooks()  # resets step caches, too
        if self._residence is not None and self._in_residence:
            self._residence.leave_all()

    @property
    def _in_residence(self) -> bool:
        """Whether a plan moves the models; diffusers may have taken its hooks away."""
        return self._residence is not None and self._residence.attached

    def at_home(self, name: str) -> list[torch.Tensor]:
        """Return the weights of a model where a plan keeps them on the host; none where it does not."""
        return [] if self._residence is None else self._residence.homes(name)

    # ---- what a call asks ----

    @property
    def keeps_text(self) -> bool:
        """Whether there is room for the prompts' keys and values from step to step."""
        return self._memory_plan is None or self._memory_plan.keep

    def make_room(self, height: int, width: int, num_frames: int, prompts: int = 1, videos: int = 1) -> None:
        """Plan anew for more than was planned for; without a budget, say that it may not fit.

        Args:
            height: pixels. Larger frames take more to decode, however few they are.
            width: likewise.
            num_frames: of each video.
            prompts: whose keys and values are kept.
            videos: to be made at once.

        Raises:
            ValueError: it does not fit into the budget; the plan that there was stays.
        """
        plan = self._memory_plan
        if plan is None or (self._residence is not None and not self._in_residence):
            return
        columns, rows, _ = plan.size
        larger = height * width * num_frames > plan.pixels or height * width > columns * rows
        if not larger and prompts <= plan.prompts and videos <= plan.videos:
            return
        size = {"height": height, "width": width, "num_frames": num_frames}
        if self._budget is not None:
            self.fit(**self._budget, **size, prompts=prompts, videos=videos)
        else:
            message = "the plan is for %dx%d, %d frames, %d of such videos; this takes more memory"
            logger.warning(message, *plan.size, plan.videos)

    def expect(self, expert: Expert | None) -> None:
        """Start to bring the expert of the next step to the device, if the plan has room for both."""
        plan = self._memory_plan
        if self._residence is not None and expert is not None and plan is not None and plan.prefetch:
            self._residence.prefetch(expert.slot)

    def decode_stream(self, z: torch.Tensor) -> Iterator[torch.Tensor]:
        """Decode raw latents chunk by chunk; where memory runs out, in more strips from then on.

        Args:
            z: of one video, "1 c t h w".

        Returns: an iterator over pixels "1 3 t h w" in [-1, 1].

        Raises:
            torch.OutOfMemoryError: it fits in no number of strips, or not in the tiles asked for.
        """
        done = 0
        while True:
            try:
                for chunk in islice(self.vae.decode_stream(z), done, None):
                    yield chunk
                    done += 1
                return
            except torch.OutOfMemoryError:
                strips = 2 * (self.vae.num_strips if self.vae.use_strips else 1)
                if self.vae.use_tiling or strips > MOST_STRIPS:
                    raise
            # Outside of the handler, which keeps what ran out alive.
            logger.warning("memory ran out while decoding; from now on it is done in %d strips", strips)
            self.vae.enable_strips(strips)

    @classmethod
    def _check_fits(cls, source: Any, budget: dict[str, Any], options: dict[str, Any]) -> None:
        """Refuse a budget that nothing fits into, before weights are downloaded or loaded.

        Raises:
            ValueError: nothing fits.
        """
        from ..accel.planning.planner import plan

        outlined = outline(cls, source, options)
        if outlined is not None:
            plan(outlined, **budget)


def _shares(parallel: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `parallelize` that from_pretrained's parallel stands for.

    Raises:
        ValueError: it is neither "auto" nor some of them.
    """
    if parallel == "auto":
        return {}
    known = list(inspect.signature(parallelize).parameters)[1:]
    if not isinstance(parallel, Mapping) or (set(parallel) - set(known)):
        raise ValueError(f"parallel={parallel!r} must be 'auto', or a dict with some of {', '.join(known)}")
    return dict(parallel)


def transformers_as_stored(options: dict[str, Any]) -> tuple[torch.dtype | None, dict[str, Any]]:
    """Let transformers be loaded as they are stored, mapped from their files, to be converted by parts.

    Args:
        options: of from_pretrained.

    Returns: the dtype that they are to have, None if that is the stored one; the options without it.
    """
    asked = options.get("dtype") or options.get("torch_dtype")
    by_name = dict(asked) if isinstance(asked, Mapping) else {"default": asked}
    slots = ("transformer", "transformer_2")
    wanted = {by_name.get(slot, by_name.get("default")) for slot in slots}
    if len(wanted) > 1 or None in wanted:  # each its own: as on one rank
        return None, options
    rest = {name: value for name, value in options.items() if name != "torch_dtype"}
    return wanted.pop(), rest | {"dtype": {**by_name, **dict.fromkeys(slots)}}
