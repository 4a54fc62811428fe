"""Where a pipeline's models are, so that videos fit into the memory that there is."""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from ..accel.offload.devices import CudaDevice, Device
from ..accel.offload.offloader import ModelOffloader, free
from ..accel.planning.meta_models import MODELS
from ..accel.planning.plans import Plan as MemoryPlan
from ..checkpoints.lora.adapters import adapters_of, has_adapters
from .acceleration import AcceleratedPipeline
from .experts import Expert

logger = logging.getLogger(__name__)

# More save no memory: what the layers remember of earlier frames is then the larger part.
MOST_STRIPS = 4
# Of what a plan is made for, what each call has of its own.
_OF_A_CALL = ("height", "width", "num_frames", "videos")


class PlacedPipeline(AcceleratedPipeline):
    """A pipeline with a plan, or a budget, for its memory."""

    _offloader: ModelOffloader | None = None
    _memory_plan: MemoryPlan | None = None
    _budget: dict[str, Any] | None = None
    _strips_before: int | None = None  # that the VAE decoded in when the plan was applied

    # ---- a plan ----

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
        offloader = None
        if device is not None:
            placed = {name: (model, plan.placements[name]) for name, model in models.items()}
            offloader = ModelOffloader(placed, device)
        if plan.quantize is not None:
            self.quantize(plan.quantize)
        self._strips_before = self.vae.num_strips if self.vae.use_strips else None
        self._decode_in(plan.strips)
        if offloader is not None:
            offloader.attach()
        self._offloader, self._memory_plan, self._budget = offloader, plan, None

    def release(self) -> None:
        """Let go of a plan: all models are on the CPU, as they were before `apply`, to the bit."""
        if self._offloader is not None:
            self._offloader.detach()
        if self._memory_plan is not None and not self.vae.use_tiling:  # or somebody has decided otherwise
            self._decode_in(self._strips_before)
        self._offloader, self._memory_plan, self._budget = None, None, None

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
        if self._offloads:
            if devices:
                raise ValueError(f"to({devices[0]!r}): the plan moves the models; call pipe.release() first")
            self.settle()
        return super().to(*args, **kwargs)

    def settle(self) -> None:
        """Let all models go home before their weights are changed."""
        self.come_home()

    def come_home(self) -> None:
        """Let all models be where they are when the pipeline rests."""
        if self._offloader is not None:
            self._offloader.offload_all()

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
        if self._offloader is not None and self._offloads:
            self._offloader.offload_transient()

    @property
    def _offloads(self) -> bool:
        """Whether a plan moves the models; diffusers may have taken its hooks away."""
        return self._offloader is not None and self._offloader.attached

    def host_weights(self, name: str) -> list[torch.Tensor]:
        """Return the weights of a model where a plan keeps them on the host; none where it does not."""
        return [] if self._offloader is None else self._offloader.host_weights(name)

    # ---- what a call asks ----

    def make_room(self, height: int, width: int, num_frames: int, videos: int = 1) -> None:
        """Plan anew for more than was planned for; without a budget, say that it may not fit.

        Args:
            height: pixels. Larger frames take more to decode, however few they are.
            width: likewise.
            num_frames: of each video.
            videos: to be made at once.

        Raises:
            ValueError: it does not fit into the budget; the plan that there was stays.
        """
        plan = self._memory_plan
        if plan is None or (self._offloader is not None and not self._offloads):
            return
        columns, rows, _ = plan.size
        larger = height * width * num_frames > plan.pixels or height * width > columns * rows
        if not larger and videos <= plan.videos:
            return
        size = {"height": height, "width": width, "num_frames": num_frames}
        if self._budget is not None:
            self.fit(**self._budget, **size, videos=videos)
        else:
            message = "the plan is for %dx%d, %d frames, %d of such videos; this takes more memory"
            logger.warning(message, *plan.size, plan.videos)

    def expect(self, expert: Expert | None) -> None:
        """Start to bring the expert of the next step to the device, if the plan has room for both."""
        plan = self._memory_plan
        if self._offloader is not None and expert is not None and plan is not None and plan.prefetch:
            self._offloader.prefetch(expert.slot)

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
