"""The flow-matching schedule of all solvers: shift, sigmas, timesteps, step index.

Flow matching interpolates linearly, x_sigma = (1 - sigma) x0 + sigma noise, and the model predicts the
velocity noise - x0. The timestep is sigma * num_train_timesteps. Sampling goes from sigma near 1 down to 0.

Source: Wan2.2 wan/utils/fm_solvers_unipc.py and wan/utils/fm_solvers.py; Lipman et al. 2022, arXiv:2210.02747
(flow matching); Esser et al. 2024, arXiv:2403.03206 (shift).
"""

import json
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from huggingface_hub import hf_hub_download

from ..checks import as_number, as_path, check_positive_int, refuse_unknown, shown
from ..downloads import OPTIONS, reaching
from .checks import check_shift, checked_table
from .hub_config import MULTISTEP_FLOW, SCHEMAS, SETTINGS, WRITER, HubSchema, read_config

logger = logging.getLogger(__name__)


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Move sigmas in [0, 1] towards 1 for shift > 1: s -> shift s / (1 + (shift - 1) s); 0 and 1 stay."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def x0_from_velocity(sample: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Predict the clean sample from a noisy one and the velocity, the model's noise - x0: x - sigma v."""
    return sample - sigma * velocity


def half_log_snr(sigma: torch.Tensor) -> torch.Tensor:
    """Time variable of the exponential solvers: log(1 - sigma) - log(sigma), -inf at 1 and +inf at 0."""
    return torch.log(1 - sigma) - torch.log(sigma)


class FlowMatchScheduler(SchedulerMixin, ConfigMixin):
    """Base of the solvers: builds the schedule and keeps the step index.

    A solver defines `schema`, `_solve` and, if it keeps a history, `_reset`. The noise levels stay on the CPU
    in float32 whatever the device of the samples, so that every machine computes the same coefficients.

    Args:
        num_train_timesteps: the timestep of pure noise, at least 2.
        shift: default shift of the schedule, above 0; `flow_shift` is another name of it.
        **settings: further settings of the diffusers class in `schema`. Those that only diffusion schedules
            read are kept for it; any other value than this solver's is refused by a ValueError.
    """

    schema: ClassVar[HubSchema]
    truncates_timesteps: ClassVar[bool] = True
    _compatibles = [schema.class_name for schema in SCHEMAS]
    order = 1  # model evaluations per step
    init_noise_sigma = 1.0

    timesteps: torch.Tensor
    sigmas: torch.Tensor

    def __init__(self, num_train_timesteps: int, shift: float, **settings: Any) -> None:
        schema, defaults = self.schema, self.schema.defaults
        shift = _one_shift(shift, settings.pop("flow_shift", None))
        refuse_unknown(type(self).__name__, settings, {"shift", *defaults, *MULTISTEP_FLOW})
        if lacks := schema.lacking(settings):
            name, value, supported = lacks
            raise ValueError(
                f"the scheduler setting {name}={shown(value)} is not supported; the nearest supported value "
                f"is {shown(supported)}; diffusers.{schema.class_name} has it"
            )
        steps = check_positive_int("num_train_timesteps", num_train_timesteps, least=2)
        own = {"num_train_timesteps": steps, "shift": shift, "flow_shift": shift}
        settings = {name: _as_json(value) for name, value in settings.items()}
        # With the names of all of diffusers' solvers, so that each can be built from it with from_config.
        config = defaults | settings | dict(MULTISTEP_FLOW) | dict(schema.fixed) | own
        # In place of these, diffusers' from_config takes the defaults of the class that it builds.
        absent = sorted(n for n in defaults if n not in {*settings, *own} and config[n] == defaults[n])
        self.register_to_config(**config, _class_name=schema.class_name)
        if absent:
            self.register_to_config(_use_default_values=absent)
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0, dtype=torch.int64)
        self.sigmas = torch.empty(0)
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._reset()

    def _reset(self) -> None:
        """Clear the solver's history."""

    @abstractmethod
    def _solve(
        self, index: int, sample: torch.Tensor, velocity: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Go from sigmas[index] to sigmas[index + 1], in float32; stochastic solvers draw by `generator`."""

    @property
    def sigma_start(self) -> float:
        """First noise level before the shift."""
        return 1.0

    # ---- schedule ----

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        shift: float | None = None,
        sigmas: Sequence[float] | np.ndarray | torch.Tensor | None = None,
        timesteps: Sequence[float] | np.ndarray | torch.Tensor | None = None,
    ) -> None:
        """Build the schedule and reset the solver, from `num_inference_steps`, or `sigmas` or `timesteps`.

        Args:
            num_inference_steps: at least 1; with a list, its length.
            device: device of `timesteps`; `sigmas` stays on the CPU.
            shift: replaces the config's, above 0; only for a schedule built from `num_inference_steps`.
            sigmas: noise levels in (0, 1], strictly descending, without the final 0; not shifted.
            timesteps: sigma * num_train_timesteps, strictly descending; not shifted, kept as floats. With
                sigmas, they are theirs, rounded, as some models are trained on them.
        Raises: ValueError: a value outside its range, or arguments that contradict each other.
        """
        if num_inference_steps is not None:
            num_inference_steps = check_positive_int("num_inference_steps", num_inference_steps)

        scale = self.config["num_train_timesteps"]
        if timesteps is not None:
            times = checked_table("timesteps", timesteps, scale, num_inference_steps, shift)
            levels = times / scale
            if sigmas is not None:
                levels = _of_timesteps(checked_table("sigmas", sigmas, 1, None, shift), times, scale)
        elif sigmas is not None:
            levels = checked_table("sigmas", sigmas, 1, num_inference_steps, shift)
            times = levels * scale
        elif num_inference_steps is None:
            raise ValueError("no schedule was given; give one of num_inference_steps, sigmas and timesteps")
        else:
            shift = self.config["shift"] if shift is None else check_shift("shift", shift)
            levels = shift_sigmas(np.linspace(self.sigma_start, 0, num_inference_steps + 1)[:-1], shift)
            times = levels * scale

        levels = np.append(levels, 0).astype(np.float32)
        if not (np.diff(levels) < 0).all():
            raise ValueError(
                f"{len(times)} steps at shift {shift} lie closer than float32 can tell apart; "
                "use fewer steps or a shift nearer to 1"
            )
        dtype = torch.int64 if self.truncates_timesteps and timesteps is None else torch.float32
        self.timesteps = torch.from_numpy(times).to(dtype).to(device)
        self.sigmas = torch.from_numpy(levels)
        self.num_inference_steps = len(times)
        self._begin_index = None
        self._step_index = None
        self._reset()

    def __len__(self) -> int:
        """Count the training timesteps."""
        return int(self.config["num_train_timesteps"])

    # ---- index ----

    @property
    def step_index(self) -> int | None:
        """Index of the next step; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, if `set_begin_index` gave one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the next run at a later step of the schedule.

        Raises: ValueError: no schedule, or an index outside it.
        """
        steps = self._require_schedule()
        self._begin_index = check_positive_int("begin_index", begin_index, least=0, most=steps - 1)

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """Return the index of the first step with this timestep, one value or several equal ones.

        Raises: ValueError: no schedule, or a timestep that is not in it.
        """
        self._require_schedule()
        values = torch.as_tensor(as_number(timestep)).flatten().unique()
        if len(values) != 1:
            raise ValueError(
                f"timestep must be one value, got {shown(values.tolist())}; "
                "set_begin_index says where to start"
            )
        distances = (self.timesteps.cpu().double() - values.cpu().double()).abs()
        index = int(distances.argmin())
        if distances[index] > 1e-3:  # float32 holds a timestep to 6e-5
            nearest = self.timesteps[index].item()
            raise ValueError(
                f"timestep {values.item()} is not in the schedule; the nearest is {nearest} (step {index}); "
                f"set_begin_index({index}) starts there"
            )
        return index

    def _require_schedule(self) -> int:
        if self.num_inference_steps is None:
            raise ValueError(f"{type(self).__name__} has no schedule yet; call set_timesteps first")
        return self.num_inference_steps

    # ---- sampling ----

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor | None,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """Take the next step of the schedule, in float32.

        Args:
            model_output: velocity, shaped like `sample`.
            timestep: where the run starts, read on its first step if no begin index is set; None: at the
                beginning. Later the index counts, so that timesteps may repeat.
            sample: noisy sample of any shape.
            generator: source of what a stochastic solver draws; the others draw nothing.
            return_dict: False returns a tuple.
        Returns: the sample at the next noise level as `prev_sample`, in the dtype of `sample`.
        Raises: ValueError: no schedule, no step left, or shapes that differ.
        """
        steps = self._require_schedule()
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output must be shaped like sample {(*sample.shape,)}, got {(*model_output.shape,)}"
            )
        index = self._step_index
        if index is None:
            index = self._begin_index
        if index is None:
            index = 0 if timestep is None else self.index_for_timestep(timestep)
        if index >= steps:
            raise ValueError(
                f"step {index} is past the end, the last is {steps - 1}; call set_timesteps to start again"
            )

        solved = self._solve(index, sample.float(), model_output.float(), generator)
        self._step_index, prev_sample = index + 1, solved.to(sample.dtype)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def scale_model_input(
        self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the sample unchanged; pipelines written for diffusers call this."""
        return sample

    def scale_noise(
        self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Bring a clean sample "b ..." to a step's noise level, (1 - sigma) x0 + sigma noise, in float32.

        `timestep` is one of the schedule's or "b"; a begin or step index takes precedence. The result has the
        sample's dtype.
        Raises: ValueError: no schedule, or a timestep that is not in it.
        """
        steps = self._require_schedule()
        index = self._begin_index if self._step_index is None else self._step_index
        if index is None:
            indices = [self.index_for_timestep(value) for value in torch.as_tensor(timestep).flatten()]
        else:
            indices = [min(index, steps)]
        sigma = self.sigmas[indices].to(sample.device).reshape(-1, *[1] * (sample.ndim - 1))
        return ((1 - sigma) * sample.float() + sigma * noise.float()).to(sample.dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor
    ) -> torch.Tensor:
        """`scale_noise` with the name and argument order of diffusers' multistep schedulers."""
        return self.scale_noise(original_samples, timesteps, noise)

    # ---- config ----

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a scheduler's config from a file, a folder or a repository, for this solver.

        A config with a setting that this solver lacks is loaded as it was saved, by the class of diffusers
        that it names; a line in the log says so. `kwargs` are options of the download, and settings that
        replace the config's.
        """
        path = as_path(pretrained_model_name_or_path)
        if not return_unused_kwargs:
            refuse_unknown(f"{cls.__name__}.from_pretrained", kwargs, {"subfolder", *SETTINGS, *OPTIONS})
        if not path.exists():
            options = {name: kwargs.pop(name) for name in OPTIONS & kwargs.keys()}
            name = str(PurePosixPath(subfolder or "", cls.config_name))
            with reaching(str(path), name, options):
                path, subfolder = Path(hf_hub_download(str(path), name, **options)).parent, None
        config, kwargs, _ = cls.load_config(
            path,
            subfolder=subfolder,
            return_unused_kwargs=True,
            return_commit_hash=True,
            **kwargs,
        )
        theirs: Any = getattr(diffusers, config.get("_class_name", ""), None)
        if theirs is not None and (lacks := _lacks(cls.schema, config, kwargs)):
            logger.info("diffusers' %s, as it was saved: %s has no %s", theirs.__name__, cls.__name__, lacks)
            return theirs.from_config(config, return_unused_kwargs, **kwargs)
        return cls.from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build this solver from the config of any flow-matching scheduler, ours or diffusers'.

        Args:
            config: config of a scheduler; this solver takes from it the settings that it has itself.
            return_unused_kwargs: whether to return (scheduler, kwargs that are no setting).
            kwargs: settings that replace the config's, such as `shift` or `flow_shift`.
        Raises: ValueError: a setting that this solver lacks. TypeError: there is no such setting.
        """
        if not return_unused_kwargs:
            refuse_unknown(f"{cls.__name__}.from_config", kwargs, SETTINGS)
        overrides = {name: kwargs.pop(name) for name in SETTINGS & kwargs.keys()}
        scheduler = cls(**read_config(config, overrides, cls.schema))
        return (scheduler, kwargs) if return_unused_kwargs else scheduler

    def to_json_string(self) -> str:
        """Return the config as JSON that plain diffusers reads."""
        schema = self.schema
        fields = {name: self.config[name] for name in schema.defaults}
        fields |= {"_class_name": schema.class_name, "_diffusers_version": WRITER}
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def _of_timesteps(levels: np.ndarray, times: np.ndarray, scale: int) -> np.ndarray:
    """Return the noise levels of timesteps that were rounded; refuse levels that they are not."""
    if len(levels) != len(times):
        raise ValueError(f"{len(levels)} sigmas contradict {len(times)} timesteps; give one of the lists")
    for i, (level, time) in enumerate(zip(levels, times, strict=True)):
        if abs(level * scale - time) >= 1:
            raise ValueError(
                f"sigmas[{i}] = {level:g} contradicts timesteps[{i}] = {time:g}; {time / scale:g} does not"
            )
    return levels


def _lacks(schema: HubSchema, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> str | None:
    """Return what a solver lacks of a config, as "name=value"; None if it has it all."""
    settings = read_config(config, {n: overrides[n] for n in SETTINGS & overrides.keys()}, schema)
    if lacks := schema.lacking(settings):
        return f"{lacks[0]}={shown(lacks[1])}"
    order = settings.get("solver_order")
    return None if order in (None, *schema.orders) else f"solver_order={shown(order)}"


def _one_shift(shift: Any, flow_shift: Any) -> float:
    """Return the shift, which has two names."""
    if flow_shift is None:
        return check_shift("shift", shift)
    if shift not in (1, flow_shift):
        raise ValueError(f"shift={shown(shift)} and flow_shift={shown(flow_shift)} are one setting; give one")
    return check_shift("flow_shift", flow_shift)


def _as_json(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic | torch.Tensor) else value
