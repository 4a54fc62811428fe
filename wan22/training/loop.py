"""A training from its settings to its files."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checks import cut, listed, parse_bytes, shown
from ..devices import has_own_memory
from ..progress import progress_bar
from ..whole_files import whole_file
from .config import TrainConfig
from .export import file_name, metadata_of, write_lora
from .loading import Base
from .planning import plan_training
from .samples import Drawing, Order
from .saving import Losses, prune, read_state, save_state, states_in
from .trainee import StepResult, Trainee
from .validation import Validation
from .videos import Videos

logger = logging.getLogger(__name__)


@dataclass
class Result:
    """What a training has made.

    Args:
        files: the LoRAs, or the folders of transformers, by slot.
        steps: steps of all experts together.
        loss: mean of each expert's last losses, by slot.
        validation: the last loss of the other clips at fixed noise, by slot.
        stopped: whether it was stopped before its last step; its state is saved.
    """

    files: dict[str, Path] = field(default_factory=dict)
    steps: int = 0
    loss: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    stopped: bool = False


def turns(experts: int, steps: int, every: int) -> list[int]:
    """Return, for each step of a run, which expert it trains: each for `every` steps, then the next one."""
    order: list[int] = []
    for start in range(0, steps, every):
        for expert in range(experts):
            order += [expert] * min(every, steps - start)
    return order


class Training:
    """A training; `run` does it, from another thread or a signal's handler `stop` ends it after its step.

    Args:
        config: the settings.
        resume: whether to go on from the last state in the output folder, if there is one.

    Raises:
        FileNotFoundError: there is no such data, checkpoint, or file of prompts.
        FileExistsError: the output folder has a training already, and `resume` is off.
        ValueError: settings, data and checkpoint do not go together.
    """

    def __init__(self, config: TrainConfig, resume: bool = False) -> None:
        from accelerate import Accelerator

        self.config, self.output = config, Path(config.output).expanduser()
        before = states_in(self.output)
        if before and not resume:
            raise FileExistsError(
                f"{cut(self.output)} has a training, saved at step {int(before[-1].name)}; resume it "
                "(--resume), or give another output"
            )
        state = read_state(before[-1]) if before else None
        if state is not None:
            config.check_resumes(state["config"])
        self.accelerator = Accelerator(
            mixed_precision="no",
            cpu=config.device == "cpu",
            log_with=config.tracker,
            project_dir=str(self.output) if config.tracker else None,
        )
        self.base = Base(config, self.device)
        self.validation = Validation.of(config, self.base)
        self.videos = Videos.of(config, self.base)
        self.trainees = self.base.trainees()
        self._plan_memory()
        self.order = Order(self.base.clips, config.batch_size, config.seed)
        self.turns = turns(len(self.trainees), config.steps, config.switch_every)
        self.step = 0
        if state is not None:
            self._load(state)
        self._stop = False
        self._placed: Trainee | None = None

    def stop(self) -> None:
        """End the run after its present step; its state is saved."""
        self._stop = True

    def run(self) -> Result:
        """Train, and return what was made.

        Raises: FloatingPointError: a loss is not finite.
        """
        config, first = self.config, self.accelerator.is_main_process
        self.output.mkdir(parents=True, exist_ok=True)
        if first:
            with whole_file(self.output / "config.toml") as partial:
                partial.write_text(config.to_toml(), encoding="utf-8")
        losses = Losses(self.output / "losses.jsonl", self.step) if first else None
        drawing = Drawing(config.seed, config.caption_dropout, self.base.first_frame)
        result, recent = Result(), {trainee.slot: list[float]() for trainee in self.trainees}
        with self._tracked(), progress_bar(total=len(self.turns), initial=self.step, unit="step") as bar:
            started, done = time.perf_counter(), 0
            while self.step < len(self.turns) and not self._stop:
                trainee = self.trainees[self.turns[self.step]]
                self._place(trainee)
                found = trainee.step(self.base.clips, self.order, drawing, self._process, self._mean)
                recent[trainee.slot] = [*recent[trainee.slot][-49:], found.loss]
                self.step, done = self.step + 1, done + 1
                self._log(losses, trainee, found)
                each = config.batch_size * config.accumulation * self.accelerator.num_processes
                bar.set_description(f"training {trainee.label}".rstrip())
                bar.set_postfix(
                    self._told(recent[trainee.slot], each * done / (time.perf_counter() - started))
                )
                bar.update()
                self._between(result, losses)
            if self._stop and self.step < len(self.turns):
                result.stopped = True
                self._save()
        result.loss = {slot: sum(values) / len(values) for slot, values in recent.items() if values}
        result.steps = self.step
        if not result.stopped:
            result.files = self._write(self.output)
        return result

    # ---- what happens between two steps ----

    def _between(self, result: Result, losses: Losses | None) -> None:
        config, count, last = self.config, len(self.trainees), self.step == len(self.turns)
        if self.validation is not None and (last or self.step % (count * config.validate_every) == 0):
            result.validation = self._validate(losses)
        if last or self.step % (count * config.save_every) == 0:
            self._save()
        sampled = config.sample_every and self.step % (count * config.sample_every) == 0
        if self.videos is not None and (last or sampled) and self.accelerator.is_main_process:
            self.videos.make(self.trainees, self.step, self._place)
            self._placed = None

    def _validate(self, losses: Losses | None) -> dict[str, float]:
        assert self.validation is not None
        found = {}
        for trainee in self.trainees:
            self._place(trainee)
            with trainee.averaged():
                found[trainee.slot] = self.validation.loss_of(trainee)
        if losses is not None:
            losses.add(step=self.step, validation=found)
        if self.config.tracker:
            self.accelerator.log({f"validation/{slot}": loss for slot, loss in found.items()}, self.step)
        return found

    def _save(self) -> None:
        """Write the state, and the LoRAs as they are."""
        if not self.accelerator.is_main_process:
            return
        folder = self.output / "steps" / f"{self.step:06}"
        self._write(folder)
        save_state(
            folder,
            {
                "config": self.config.plain(),
                "step": self.step,
                "data": self.base.fingerprint,
                "experts": {trainee.slot: trainee.state() for trainee in self.trainees},
            },
        )
        prune(self.output, self.config.keep)

    def _write(self, folder: Path) -> dict[str, Path]:
        """Write what was trained into a folder."""
        files: dict[str, Path] = {}
        if not self.accelerator.is_main_process:
            return files
        for trainee in self.trainees:
            span = trainee.timesteps.low, trainee.timesteps.high
            facts = self.base.facts | {"ss_steps": trainee.steps}
            with trainee.averaged():
                if self.config.method == "full":
                    files[trainee.slot] = folder / trainee.slot
                    trainee.model.save_pretrained(files[trainee.slot])
                    continue
                path = folder / file_name(self.config, trainee.slot, self.base.experts)
                metadata = metadata_of(self.config, self.base.name, trainee.slot, span, facts)
                write_lora(path, trainee.model, metadata, self.config.diffusers_names)
                files[trainee.slot] = path
        return files

    def _load(self, state: Mapping[str, Any]) -> None:
        if state["data"] != self.base.fingerprint:
            raise ValueError(
                f"{cut(self.output)} was trained on other clips than {cut(self.config.data)} has now; give "
                "another output"
            )
        if missing := {t.slot for t in self.trainees} ^ state["experts"].keys():
            raise ValueError(f"{cut(self.output)} was trained with other experts: {listed(missing)}")
        for trainee in self.trainees:
            trainee.load(state["experts"][trainee.slot])
        self.step = state["step"]

    # ---- processes and devices ----

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        config, accelerator = self.config, self.accelerator
        if config.device is None or accelerator.num_processes > 1:
            return torch.device(accelerator.device)
        return torch.device(config.device)

    def _plan_memory(self) -> None:
        """Let blocks that do not fit into the budget be streamed."""
        config, clips = self.config, self.base.clips
        if config.memory is None:
            return
        if not has_own_memory(self.device):
            raise ValueError(f"memory={shown(config.memory)} is a GPU's; {self.device} has the host's")
        shape = max((item.shape for item in clips.items), key=math.prod)
        budget, width = parse_bytes(config.memory, "memory"), clips.empty_text.shape[1]
        for trainee in self.trainees:
            plan = plan_training(trainee.model, trainee.trained, config, shape, width, budget)
            logger.info("%s: planned %s", trainee.label or trainee.slot, plan)
            if plan.streamed:
                trainee.stream(self.device, plan.streamed)

    @property
    def _process(self) -> tuple[int, int]:
        return self.accelerator.process_index, self.accelerator.num_processes

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean of a tensor over all processes."""
        mean: Any = self.accelerator.reduce(x, "mean")
        return mean

    def _place(self, trainee: Trainee) -> None:
        """Bring an expert to the device, after the other one has left it."""
        if self._placed is trainee:
            return
        for other in self.trainees:
            if other is not trainee:
                other.place(torch.device("cpu"))
        trainee.place(self.device)
        self._placed = trainee

    # ---- logs ----

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        if not self.config.tracker:
            yield
            return
        self.accelerator.init_trackers(self.config.name, config=self.config.plain())
        try:
            yield
        finally:
            self.accelerator.end_training()

    def _log(self, losses: Losses | None, trainee: Trainee, found: StepResult) -> None:
        values = {"loss": found.loss, "gradient_norm": found.gradient_norm, "lr": found.learning_rate}
        if losses is not None:
            losses.add(step=self.step, expert=trainee.slot, expert_step=trainee.steps, **values)
        if self.config.tracker:
            self.accelerator.log({f"{trainee.slot}/{name}": v for name, v in values.items()}, self.step)

    def _told(self, recent: list[float], speed: float) -> dict[str, str]:
        told = {"loss": f"{sum(recent) / len(recent):.4f}", "samples/s": f"{speed:.2g}"}
        if self.device.type == "cuda":
            told["peak"] = f"{torch.cuda.max_memory_allocated(self.device) / 1e9:.1f} GB"
        return told
