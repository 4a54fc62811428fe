"""EasyCache: the velocity changes at about a constant rate with the latents, while they go straight on."""

from collections.abc import Sequence

import torch

from ..experts import Step
from ..passes import Passes
from .places import Place
from .skipping import SkippingPredictor, Track


class EasyTrack(Track):
    """What is known of one video; tensors are "1 c t h w" float32."""

    def __init__(self) -> None:
        super().__init__()
        self.before: torch.Tensor | None = None  # latents of the step before
        self.latents: torch.Tensor | None = None  # of the last computed step
        self.velocity: torch.Tensor | None = None  # of its first pass
        self.offsets: dict[str, torch.Tensor] = {}  # of each pass's velocity from the latents
        self.rate: float | None = None  # change of the velocity over that of the latents
        self.change = 0.0  # estimated relative change of the velocity since the last computed step


class EasyPredictor(SkippingPredictor):
    """Moves the last velocity along with the latents while its estimated change is below a threshold.

    After a computed step the rate is k = mean|v - v'| / mean|x - x'|, where x' and v' are the latents and the
    velocity of the computed step before. Each further step adds k * mean|x - x_before| / mean|v|. Below the
    threshold, each pass has x + (v' - x'), where v' and x' are those of the last computed step.

    Source: H-EmbodVis/EasyCache, EasyCache4Wan2.1.
    """

    def _new_track(self, place: Place) -> EasyTrack:
        return EasyTrack()

    def _wants_to_skip(self, track: EasyTrack, place: Place, latents: torch.Tensor, allowed: bool) -> bool:
        wanted = False
        if allowed and track.rate is not None and track.velocity is not None and track.before is not None:
            track.change += track.rate * _mean(latents - track.before) / _mean(track.velocity)
            wanted = track.change < self.cache.at("threshold", place.slot)
        track.before = latents.clone()  # a solver may write its result to them
        return wanted

    def _compute(
        self, place: Place, latents: torch.Tensor, step: Step, passes: Passes, videos: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        predicted = self.inner(latents, step, passes, videos)
        first = next(iter(passes))
        for i, video in enumerate(videos):
            track, x = self._tracks[video], self._tracks[video].before
            velocity = predicted[first][i : i + 1].clone()
            if track.latents is not None and (moved := _mean(x - track.latents)) > 0:
                track.rate = _mean(velocity - track.velocity) / moved
            track.latents, track.velocity, track.change = x, velocity, 0.0
            track.offsets = {name: each[i : i + 1] - x for name, each in predicted.items()}
        return predicted

    def _estimate(
        self, place: Place, latents: torch.Tensor, step: Step, passes: Passes, videos: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        tracks = [(video, self._tracks[video]) for video in videos]
        return {
            name: torch.cat([latents[video : video + 1] + track.offsets[name] for video, track in tracks])
            for name in passes
        }


def _mean(difference: torch.Tensor) -> float:
    return float(difference.abs().mean())
