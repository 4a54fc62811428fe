"""What every step cache does: it decides, for each video, and lets the rest be computed.

Shapes: b videos, n of them that are predicted, c latent channels, t h w latent frames, l tokens, d their
width.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from ..experts import Step
from ..passes import Passes, Residuals
from .decisions import Decision, decision_of
from .places import Place, places_of
from .settings import StepCache


class Track:
    """What a cache knows of one video since its expert took over, or its size changed."""

    def __init__(self) -> None:
        self.texts: dict[str, torch.Tensor] = {}  # of the passes of the last computed step

    def forget(self) -> None:
        """Drop what was kept of other passes or prompts than those that are computed next."""


class SkippingPredictor:
    """Estimates the passes of a step from those of earlier ones where a cache's settings allow it.

    The first pass, that with the prompt, decides for all passes of the step. A step is computed if one of its
    passes was none of the last computed step's, or had another prompt. Videos decide by themselves, and those
    of a batch are what they are alone. Nothing is kept when another expert takes over or the size changes.

    Args:
        inner: runs the transformer.
        cache: the settings.
        call: a call; its steps, state and ranks.
    """

    def __init__(self, inner: Any, cache: StepCache, call: Any, ranks: Any) -> None:
        self.inner: Any = inner
        self.cache, self.state, self.ranks = cache, call.state, ranks
        self._places = places_of(call.steps)
        self._model: Any = None
        self._tracks: dict[int, Any] = {}

    def __call__(
        self, latents: torch.Tensor, step: Step, passes: Passes, videos: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Return what each pass predicts for some of the videos, "n c t h w" float32."""
        place = self._places[step.index]
        if place.begins or step.expert.model is not self._model:  # a callback may replace it
            self._tracks, self._model = {}, step.expert.model
        skips = self._skips(place, latents, passes, videos)
        computed = [video for video, skip in zip(videos, skips, strict=True) if not skip]
        skipped = [video for video, skip in zip(videos, skips, strict=True) if skip]
        self.state.count_passes(computed, skipped, len(passes))
        found: dict[int, dict[str, torch.Tensor]] = {}
        for some, predict in ((computed, self._compute), (skipped, self._estimate)):
            if some:
                predicted = predict(place, latents, step, passes, some)
                for i, video in enumerate(some):
                    found[video] = {name: each[i : i + 1] for name, each in predicted.items()}
        if len(found) == 1:
            return next(iter(found.values()))
        return {name: torch.cat([found[video][name] for video in videos]) for name in passes}

    def _skips(
        self, place: Place, latents: torch.Tensor, passes: Passes, videos: Sequence[int]
    ) -> list[bool]:
        """Return for each video whether the step is skipped: if no rank would compute it."""
        texts = {name: each.text for name, each in passes.items()}
        allowed = place.may_be_skipped(self.cache.at("warmup", place.slot))
        skips = []
        for video in videos:
            if video not in self._tracks:
                self._tracks[video] = self._new_track(place)
            track = self._tracks[video]
            known = self._knows(track, texts)
            if not known:
                track.forget()
            skips.append(self._wants_to_skip(track, place, latents[video : video + 1], allowed and known))
        computed = self.ranks.any(*(not skip for skip in skips))
        for video, must in zip(videos, computed, strict=True):
            if must:
                self._tracks[video].texts = texts
        return [not must for must in computed]

    def _knows(self, track: Track, texts: dict[str, torch.Tensor]) -> bool:
        """Whether the passes of the last computed step are those of this one, or more."""
        if self.ranks.shares_passes and track.texts.keys() != texts.keys():
            return False  # which rank has run a pass depends on how many there were
        return all(name in track.texts and _equal(track.texts[name], text) for name, text in texts.items())

    @abstractmethod
    def _new_track(self, place: Place) -> Track:
        """Return what is known of a video before an expert's first step."""

    @abstractmethod
    def _wants_to_skip(self, track: Any, place: Place, latents: torch.Tensor, allowed: bool) -> bool:
        """Take note of a step of one video, "1 c t h w"; return whether to skip it, if that is allowed."""

    @abstractmethod
    def _compute(
        self, place: Place, latents: torch.Tensor, step: Step, passes: Passes, videos: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Run the passes of some videos, and keep what later estimates need."""

    @abstractmethod
    def _estimate(
        self, place: Place, latents: torch.Tensor, step: Step, passes: Passes, videos: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Return the passes' predictions for some videos, not computed."""


class ResidualTrack(Track):
    """What is known of one video: what the steps' indices decide, and residuals "1 l d" by pass."""

    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self.decision = decision
        self.residuals: dict[str, Any] = {}  # as the cache keeps them

    def forget(self) -> None:
        """See Track. Ranks that run different passes would otherwise have different histories of one."""
        self.residuals = {}


class ResidualPredictor(SkippingPredictor):
    """Skips the blocks alone: the embedding of a step's own latents and the head always run.

    Each rank keeps the residuals of its own tokens, of the passes that it runs.
    """

    def _new_track(self, place: Place) -> ResidualTrack:
        decision = decision_of(self.cache, place)
        assert decision is not None, "residual caches decide by the steps' indices"
        return ResidualTrack(decision)

    def _wants_to_skip(
        self, track: ResidualTrack, place: Place, latents: torch.Tensor, allowed: bool
    ) -> bool:
        return allowed and track.decision.skips(place)

    def _compute(
        self, place: Place, latents: torch.Tensor, step: Step, passes: Passes, videos: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        for video in videos:
            self._tracks[video].decision.computed(place)

        def keep(name: str, video: int, residual: torch.Tensor) -> None:
            self.keep(self._tracks[video], place, name, residual)

        return self.inner(latents, step, passes, videos, Residuals(keep=keep))

    def _estimate(
        self, place: Place, latents: torch.Tensor, step: Step, passes: Passes, videos: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        def supply(name: str, video: int) -> torch.Tensor:
            return self.supply(self._tracks[video], place, name)

        return self.inner(latents, step, passes, videos, Residuals(supply=supply))

    @abstractmethod
    def keep(self, track: ResidualTrack, place: Place, name: str, residual: torch.Tensor) -> None:
        """Keep a pass's residual "1 l d" of a computed step."""

    @abstractmethod
    def supply(self, track: ResidualTrack, place: Place, name: str) -> torch.Tensor:
        """Return the estimate of a pass's residual, "1 l d"."""


def _equal(text: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether texts are the same, which they are as objects unless a callback gives others."""
    return text is other or (text.shape == other.shape and torch.equal(text, other))
