"""Where a pipeline's models are kept, so that videos fit into the memory that there is."""

import logging
from typing import Any

import torch

from ...accel.offload.devices import CudaDevice, Device, HostDevice
from ...accel.offload.offloader import ModelOffloader, free, was_freed
from ...accel.planning.meta_models import MODELS
from ...accel.planning.passes import Passes, covers
from ...accel.planning.plans import Plan
from ...checkpoints.deferred import deferred_weights
from ...checkpoints.loading.alignment import unaligned_weights
from ...checkpoints.loading.models import is_ours
from ...checkpoints.lora.adapters import adapters_of
from ...checks import as_number, keywords_of, refuse_unknown, shown
from ...host_memory import anonymous_bytes, available_ram, check_room
from ...private_apis import accelerate_hook, is_group_offloaded, own_tensors, uncompiled
from ..call.experts import Expert
from .part import Part

logger = logging.getLogger(__name__)

# Arguments of `fit` that belong to one call; a new plan for a larger call replaces them.
_PER_CALL = ("height", "width", "num_frames", "videos", "residuals", "passes")


class Memory(Part):
    """A pipeline's memory plan, and the offloader that carries it out."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.plan: Plan | None = None
        self._offloader: ModelOffloader | None = None
        self._budget: dict[str, Any] | None = None  # what plans are made within, the next one, too
        self._automatic = False  # whether the plan was made because the weights do not fit into the host
        self._strips_before: int | None = None  # the VAE's, when the plan was applied

    @property
    def moves_models(self) -> bool:
        """Whether a plan moves the models; diffusers may have taken its hooks away."""
        return self._offloader is not None and self._offloader.attached

    @property
    def _models(self) -> dict[str, Any]:
        """The models that there are, by component name."""
        found = {name: getattr(self._pipe, name, None) for name in MODELS}
        return {name: model for name, model in found.items() if model is not None}

    @property
    def has_plan(self) -> bool:
        """Whether there is a plan, or a budget that the next call makes one within."""
        return self.plan is not None or self._budget is not None

    @property
    def budget(self) -> str | None:
        """Memory of the device for plans, "auto" for what is free; None if nobody gave one."""
        if self._budget is None or self._automatic:
            return None
        vram = as_number(self._budget["vram"])
        return "auto" if vram is None else str(round(vram) if isinstance(vram, float) else vram)

    @property
    def plans_next(self) -> bool:
        """Whether the next call makes a plan before all else."""
        return self.plan is None and (self._budget is not None or self._too_large_for_host())

    def plan_within(self, vram: str | float | None, ram: str | float | None = None, **options: Any) -> None:
        """Let the next call make a plan for its size and apply it; the arguments are those of `fit`."""
        self.release()
        self._budget = {"vram": vram, "ram": ram, **options}

    def fit(self, vram: str | float | None = None, ram: str | float | None = None, **options: Any) -> Plan:
        """Find the fastest way to make videos in a budget, apply it, and do so anew for larger videos.

        Args:
            vram: memory of the device, such as "12GB"; default is what is free.
            ram: memory of the host; default is what is free.
            **options: arguments of `wan22.accel.plan`, such as `height`, `width`, `num_frames`, `quantize`.

        Returns: the plan; print it.

        Raises:
            ValueError: nothing fits; the plan that was applied before stays.
        """
        from ...accel.planning.planner import plan

        refuse_unknown("fit", options, keywords_of(plan))
        found = plan(self._pipe, vram=vram, ram=ram, **options)
        self.apply(found)
        fixed = {name: value for name, value in options.items() if name not in _PER_CALL}
        self._budget = {"vram": vram, "ram": ram, **fixed}
        return found

    def apply(self, plan: Plan, device: Device | None = None) -> None:
        """Keep the models where a plan of `wan22.accel.plan` for this pipeline says, and decode as it says.

        `device` is the models'; default is the plan's.

        Raises:
            ValueError: the plan is for another pipeline, its device is not here, ranks have divided the
                weights, or something else offloads the models. No plan is applied then.
        """
        pipe = self._pipe
        pipe.ranks.check_whole()
        models = self._models
        if missing := [name for name in models if name not in plan.placements]:
            raise ValueError(
                f"the plan for {plan.name} does not say where to keep {missing[0]}; make one for this "
                "pipeline: wan22.accel.plan(pipe)"
            )
        if plan.strips is not None and not is_ours(pipe.vae):
            raise ValueError(f"the plan decodes in {plan.strips} strips, which wan22's VAE alone does")
        if plan.strips is not None and pipe.vae.use_tiling:
            raise ValueError(
                f"the plan decodes in {plan.strips} strips, and tiling is enabled; call "
                "pipe.vae.disable_tiling() first"
            )
        if device is None and plan.machine.has_device:
            device = CudaDevice(plan.machine.device)
        elif device is None and any(placed.kind != "host" for placed in plan.placements.values()):
            device = HostDevice()
        self.release()
        offloader = None
        if device is not None:
            placed = {name: (model, plan.placements[name]) for name, model in models.items()}
            offloader = ModelOffloader(placed, device)
        if plan.quantize is not None:
            pipe.quantize(plan.quantize)
        if is_ours(pipe.vae):  # diffusers' has no strips
            self._strips_before = pipe.vae.num_strips if pipe.vae.use_strips else None
            self._decode_in(plan.strips)
        self._compute_in(plan.token_chunks, plan.in_turn)
        if offloader is not None:
            offloader.attach()
        self._offloader, self.plan, self._budget, self._automatic = offloader, plan, None, False

    def release(self) -> None:
        """Undo a plan: all models are on the CPU, as they were before `apply`, to the bit."""
        if self._offloader is not None:
            self._offloader.detach()
        vae = self._pipe.vae
        if self.plan is not None and is_ours(vae) and not vae.use_tiling:  # tiling was enabled since
            self._decode_in(self._strips_before)
        if self.plan is not None:
            self._compute_in(1, False)
        self._offloader, self.plan, self._budget, self._automatic = None, None, None, False

    def _compute_in(self, chunks: int, in_turn: bool) -> None:
        """Let blocks compute the tokens in so many parts, and all passes in turn."""
        for model in self._pipe.transformers:
            if is_ours(model):
                uncompiled(model).set_token_chunks(chunks)
                uncompiled(model).set_samples_in_turn(in_turn)

    def _decode_in(self, strips: int | None) -> None:
        """Let videos be decoded in strips; None: in whole frames."""
        if strips is None:
            self._pipe.vae.disable_strips()
        else:
            self._pipe.vae.enable_strips(strips)

    def offload_all(self) -> None:
        """Bring all weights to the host, where they can be changed; refused if ranks have divided them."""
        self._pipe.ranks.check_whole()
        if self._offloader is not None:
            self._offloader.offload_all()

    def end_call(self) -> None:
        """Leave the device as it is between calls: only resident models stay."""
        if self._offloader is not None and self.moves_models:
            self._offloader.offload_transient()

    def check_movable(self, *destinations: Any) -> None:
        """Refuse to move models while a plan moves them, or to change weights that ranks have divided.

        A MemoryError says if the host has no room for weights in another dtype.
        """
        devices = [d for d in destinations if not isinstance(d, torch.dtype | None)]
        if self._automatic and devices:
            self.release()
        if (self.moves_models or self._budget is not None) and devices:
            raise ValueError(f"to({shown(devices[0])}): the plan moves the models; call pipe.release() first")
        self.offload_all()
        here = all(str(device) == "cpu" for device in devices)
        for dtype in (d for d in destinations if here and isinstance(d, torch.dtype)):
            weights = [weight for model in self._models.values() for weight in model.parameters()]
            cast = [weight for weight in weights if weight.is_cpu and weight.dtype != dtype]
            nbytes = sum(weight.numel() for weight in cast) * dtype.itemsize
            check_room(nbytes - anonymous_bytes(cast), f"to({shown(dtype)})", "load with dtype= and memory=")

    def host_weights(self, name: str) -> list[torch.Tensor]:
        """Return a model's weights on the host while it is on the device."""
        return [] if self._offloader is None else self._offloader.host_weights(name)

    def check_weights(self) -> None:
        """Refuse, with a RuntimeError, to use models that this pipeline, or one sharing them, has freed."""
        if freed := [name for name, model in self._models.items() if was_freed(model)]:
            raise RuntimeError(
                f"pipe.free() has emptied {', '.join(freed)}; load the pipeline again, with from_pretrained"
            )

    def free(self) -> None:
        """Give all memory back to the system; the pipeline has no weights afterwards and cannot run."""
        pipe = self._pipe
        self.release()
        for model in pipe.transformers:
            adapters_of(model).unload()
        free(module for module in pipe.components.values() if isinstance(module, torch.nn.Module))

    # ---- what a call asks ----

    def make_room(
        self,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        videos: int = 1,
        residuals: int = 0,
        passes: Passes | None = None,
    ) -> None:
        """Make a plan for a call's size if there is none yet, or if it is larger than planned for.

        Default are the checkpoint's own sizes; `residuals` are what a step cache keeps, `passes` those of a
        step, see `plan`. Without a budget there is a warning that a larger call may not fit. Larger frames
        take more to decode, however few. If nothing fits, a ValueError says so; the plan stays.
        """
        preset, plan = self._pipe.preset, self.plan
        size = {
            "height": preset.height if height is None else height,
            "width": preset.width if width is None else width,
            "num_frames": preset.num_frames if num_frames is None else num_frames,
        }
        others = {"videos": videos, "residuals": residuals, "passes": passes}
        if plan is None:
            if self.plans_next:
                self._plan_for(**size, **others)
            return
        if self._offloader is not None and not self.moves_models:
            return
        columns, rows, _ = plan.size
        pixels = size["height"] * size["width"]
        larger = pixels * size["num_frames"] > plan.pixels or pixels > columns * rows
        fits = not larger and videos <= plan.videos and residuals <= plan.residuals
        if fits and covers(plan.passes, passes or ()):
            return
        if self._budget is not None:
            self._plan_for(**size, **others)
        else:
            message = "the plan is for %dx%d, %d frames, %d of such videos; this takes more memory"
            logger.warning(message, *plan.size, plan.videos)

    def _plan_for(self, **call: Any) -> None:
        automatic = self._budget is None or self._automatic
        self.fit(**(self._budget or {"device": "cpu"}), **call)
        if automatic and not self._automatic:
            logger.info("the host has no room for all weights at once; this is done:\n%s", self.plan)
        self._automatic = automatic

    def _too_large_for_host(self) -> bool:
        """Whether running on the CPU would copy more weights than there is memory for.

        Half of what is free is left for the rest.
        """
        models, room = self._models.values(), available_ram() / 2
        modules = (module for model in models for module in model.modules())
        tensors = (tensor for module in modules for own in own_tensors(module) for tensor in own.values())
        if sum(tensor.nbytes for tensor in tensors if tensor is not None) <= room:
            return False  # whatever has to be copied: each call asks several times
        moved = any(accelerate_hook(model) is not None or is_group_offloaded(model) for model in models)
        elsewhere = any(not weight.is_cpu for model in models for weight in model.parameters())
        if moved or elsewhere or self._pipe.parallel is not None:
            return False
        copied = [
            weight.nbytes
            for model in models
            for weight in (*unaligned_weights(model), *deferred_weights(model))
        ]
        return sum(copied) > room

    def ready(self) -> None:
        """Make a plan for the checkpoint's own size, if the next call would make one."""
        if self.plans_next:
            self.make_room()

    def prefetch_next(self, expert: Expert | None) -> None:
        """Start to bring the expert of the next step to the device, if the plan has room for both."""
        plan = self.plan
        if self._offloader is not None and expert is not None and plan is not None and plan.prefetch:
            self._offloader.prefetch(expert.slot)
