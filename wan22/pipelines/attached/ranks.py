"""What a pipeline asks of the processes that make its videos together."""

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import torch

from ..call.passes import Passes, Run

Value = TypeVar("Value")
Frame = TypeVar("Frame")


class Ranks(Protocol):
    """The processes that share a pipeline's work: OneRank, or `wan22.accel.parallel.Parallel`."""

    first: bool  # whether this process shows progress and previews, and writes files
    shares_rows: bool  # whether the VAE's rows are shared
    shares_passes: bool  # whether ranks run different passes of a step that has two

    def agreed(self, value: Value) -> Value:
        """Return the first rank's value."""
        ...

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return of each flag whether it is set on any rank."""
        ...

    def mean_over_tokens(self, values: torch.Tensor) -> float:
        """Return the mean of float32 values "… l" of the blocks' tokens, where ranks share them of all."""
        ...

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums of all ranks' values."""
        ...

    def run_passes(self, passes: Passes, predict: Run) -> list[torch.Tensor]:
        """Run the passes of a step and return what each predicts."""
        ...

    def frames_here(self, frames: Iterator[Frame], vae: Any) -> Iterator[Frame]:
        """Return the frames of a stream that this rank has; all ranks must go through theirs."""
        ...

    def check_whole(self) -> None:
        """Refuse, with a ValueError, what needs whole weights where each rank has a part of them."""
        ...


class OneRank:
    """A process by itself."""

    first = True
    shares_rows = False
    shares_passes = False

    def agreed(self, value: Value) -> Value:
        """Return the value."""
        return value

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return the flags."""
        return flags

    def mean_over_tokens(self, values: torch.Tensor) -> float:
        """Return the mean."""
        return float(values.mean())

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values."""
        return values

    def run_passes(self, passes: Passes, predict: Run) -> list[torch.Tensor]:
        """Run all passes."""
        return predict(passes)

    def frames_here(self, frames: Iterator[Frame], vae: Any) -> Iterator[Frame]:
        """Return all frames."""
        return frames

    def check_whole(self) -> None:
        """Weights are always whole."""
