"""Videos of the present weights, by the library's own pipeline."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..checks import as_path, cut
from ..devices import has_own_memory
from ..video.sheets import contact_sheet
from ..whole_files import whole_file
from .config import TrainConfig
from .trainee import Trainee

COLUMNS, CELL = 6, 192  # frames of a row of the contact sheet, and their width in pixels
IMAGES = ("image", "last_image")


class Videos:
    """Prompts of which videos are made, their text encoded before the training.

    Args:
        pipe: the pipeline of the transformers in training.
        calls: arguments of its calls, with prompts.
        folder: where videos go.
    """

    def __init__(
        self, pipe: Any, calls: Sequence[dict[str, Any]], folder: Path, device: torch.device
    ) -> None:
        self.pipe, self.calls, self.folder, self.device = pipe, calls, folder, device

    @classmethod
    def of(cls, config: TrainConfig, base: Any) -> "Videos | None":
        """Return those of a training; None: it has none."""
        if config.sample_prompts is None:
            return None
        calls = read_prompts(as_path(config.sample_prompts))
        encoder = base.text_pipeline()
        encoder.to(base.device)
        for call in calls:
            prompt, negative = encoder.encode_prompt(call["prompt"], call.pop("negative_prompt", None))
            call |= {"prompt_embeds": prompt.cpu(), "negative_prompt_embeds": negative.cpu()}
        encoder.to("cpu")
        return cls(base.pipe, calls, as_path(config.output) / "samples", base.device)

    def make(self, trainees: Sequence[Trainee], step: int, place: Callable[[Trainee], None]) -> None:
        """Make a video of each prompt, named after the step, and a contact sheet of all.

        Afterwards it is open where the transformers are; the training places them anew.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        offloads = has_own_memory(self.device)
        with ExitStack() as stack:
            for trainee in trainees:
                trainee.model.eval()
                stack.enter_context(trainee.averaged())
            if offloads:  # each transformer is on the device for its steps alone
                for trainee in trainees:
                    trainee.place(torch.device("cpu"))
                self.pipe.enable_model_cpu_offload(device=self.device)
                stack.callback(self.pipe.remove_all_hooks)
            self.pipe.set_progress_bar_config(disable=True)
            videos = []
            for number, call in enumerate(self.calls):
                arguments = {name: value for name, value in call.items() if name != "prompt"}
                video = self.pipe(**{"seed": number, **arguments})
                video.save(self.folder / f"{step:06}-{number}.mp4", overwrite=True)
                videos.append(video.as_uint8()[0])
        sheet = contact_sheet(videos, [call["prompt"] for call in self.calls], COLUMNS, CELL)
        with whole_file(self.folder / f"{step:06}.png") as partial:
            sheet.save(partial)


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """Return the arguments of a call for each line: a prompt, or, in a .jsonl, an object with them.

    Paths of images are relative to the file's folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no item, or there is none.
    """
    if not file.is_file():
        raise FileNotFoundError(f"sample_prompts: there is no file {cut(file)}")
    calls: list[dict[str, Any]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        call: Any = {"prompt": line.strip()}
        if file.suffix == ".jsonl":
            try:
                call = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{cut(file)}, line {number} is no JSON: {error}") from error
        if not isinstance(call, dict) or not isinstance(call.get("prompt"), str):
            raise ValueError(f'{cut(file)}, line {number} must be {{"prompt": "…"}} with further arguments')
        calls.append(call | {n: str(file.parent / call[n]) for n in IMAGES if isinstance(call.get(n), str)})
    if not calls:
        raise ValueError(f"{cut(file)} has no prompts")
    return calls
