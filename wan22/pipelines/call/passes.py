"""The transformer's passes of a step: with the prompt, and with the negative one.

Shapes: b videos, n of them that are predicted, c latent channels, t h w latent frames, rows, columns, l text
tokens, d their width.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from ...accel.sparse.settings import SparseAttention
from ...checkpoints.loading.diffusers_caches import attention_caches_of_video
from ...checkpoints.loading.models import is_ours
from ...models.attention_guidance import AttentionGuidance
from .conditions import Condition
from .experts import Step
from .few_steps import with_scales
from .state import CallState


@dataclass(frozen=True)
class Pass:
    """One run of the transformer over a step's latents."""

    text: torch.Tensor  # tokens, "b l d"
    skip_layers: tuple[int, ...] = ()  # indices of the blocks that do not run
    negative: torch.Tensor | None = None  # tokens that cross-attention keeps away from, "b l d"
    attention: AttentionGuidance | None = None  # how it does so


Passes = Mapping[str, Pass]
# Given passes by their names, it returns what each predicts, "n c t h w".
Run = Callable[[Passes], list[torch.Tensor]]
RunPasses = Callable[[Passes, Run], list[torch.Tensor]]


@dataclass(frozen=True)
class Residuals:
    """What becomes of the residual "1 l d", what the blocks add to the tokens, of each pass and video."""

    # Is given what the blocks add, in the dtype of the model's large layers, of the passes of this rank.
    keep: Callable[[str, int, torch.Tensor], None] | None = None
    # Gives what is added in the blocks' place: none of them runs.
    supply: Callable[[str, int], torch.Tensor] | None = None


class Predictor(Protocol):
    """Predicts the velocity of each pass of a step. What skips passes wraps another predictor."""

    def __call__(
        self, latents: torch.Tensor, step: Step, passes: Passes, videos: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Return what each pass predicts for some of the videos.

        Args:
            latents: of all videos of the call, noisy, "b c t h w" float32.
            step: the step.
            passes: by their names: "cond", "uncond", "skip".
            videos: indices of those that are wanted.

        Returns: by the passes' names, "n c t h w" float32.
        """
        ...


class ModelPredictor:
    """Runs the step's transformer.

    Each video goes through the model by itself: to the last bit it does not depend on its neighbours in the
    batch, and one video's tokens fill a device.

    Args:
        condition: what the transformer gets beside text.
        state: the call's.
        run_passes: runs the passes of a step, or shares them among ranks.
        attention: what self-attention leaves out, after the steps in which it is dense.
    """

    def __init__(
        self,
        condition: Condition,
        state: CallState,
        run_passes: RunPasses,
        attention: SparseAttention | None = None,
    ) -> None:
        self.condition, self.state, self._run_passes = condition, state, run_passes
        self.attention = attention

    def __call__(
        self,
        latents: torch.Tensor,
        step: Step,
        passes: Passes,
        videos: Sequence[int],
        residuals: Residuals = Residuals(),
    ) -> dict[str, torch.Tensor]:
        """Return what each pass predicts for some of the videos, "n c t h w" float32.

        Args:
            latents, step, passes, videos: see Predictor.
            residuals: for wan22's transformers alone.
        """
        predict = partial(self._predict, latents, step, videos, residuals)
        predicted = self._run_passes(passes, partial(_in_groups, predict))
        return dict(zip(passes, predicted, strict=True))

    def _predict(
        self,
        latents: torch.Tensor,
        step: Step,
        videos: Sequence[int],
        residuals: Residuals,
        passes: Passes,
    ) -> list[torch.Tensor]:
        """Run passes: video by video, or together if the model takes their samples in turn."""
        model: Any = step.expert.model
        samples = latents.split(1)

        def inputs(video: int) -> dict[str, Any]:
            return self.condition.model_inputs(video, samples[video], step.timestep.reshape(1))

        runs = list(passes.values())
        texts = [text for run in runs for text in (run.text, run.negative) if text is not None]
        # A callback may have given other embeddings.
        alike = all(len(text) == len(samples) and text.shape == texts[0].shape for text in texts)
        if not alike or not takes_samples_in_turn(model):
            return [
                torch.cat([self._run(name, run, video, inputs(video), step, residuals) for video in videos])
                for name, run in passes.items()
            ]
        each = [inputs(video) for video in videos]
        batch = {name: torch.cat([given[name] for given in each] * len(passes)) for name in each[0]}
        text = torch.cat([run.text[list(videos)] for run in runs]).to(model.dtype)
        batch |= _options_of_ours(runs, videos, model.dtype)
        order = [(name, video) for name in passes for video in videos]
        return list(self._call(model, batch, text, step, order, residuals).chunk(len(passes)))

    def _run(
        self,
        name: str,
        run: Pass,
        video: int,
        inputs: dict[str, Any],
        step: Step,
        residuals: Residuals,
    ) -> torch.Tensor:
        """Run one pass of a video. diffusers' step caches keep what they skip by pass and video."""
        model: Any = step.expert.model
        text = run.text[video : video + 1].to(model.dtype)
        video_caches: AbstractContextManager[None] = nullcontext()
        if is_ours(model):
            inputs |= _options_of_ours([run], [video], model.dtype)
        else:
            inputs, video_caches = _for_diffusers(model, inputs), attention_caches_of_video(model, video)
        state = {"step_index": step.index, "sigma": step.sigma, "num_inference_steps": step.count}
        with video_caches, model.cache_context(name + (f"-{video}" if video else ""), **state):
            return self._call(model, inputs, text, step, [(name, video)], residuals)

    def _call(
        self,
        model: Any,
        inputs: dict[str, Any],
        text: torch.Tensor,
        step: Step,
        samples: Sequence[tuple[str, int]],
        residuals: Residuals,
    ) -> torch.Tensor:
        """Call a transformer for samples, each of a pass and a video."""
        attention_kwargs = with_scales(self.state.attention_kwargs, step.lora_scales)
        kwargs: dict[str, Any] = {"attention_kwargs": attention_kwargs, "return_dict": False}
        if self.attention is not None and step.index >= self.attention.first_step(step.count):
            kwargs["self_attention"] = self.attention
        if residuals.supply is not None:
            kwargs["residual"] = torch.cat([residuals.supply(*sample) for sample in samples])
        if residuals.keep is not None:
            kwargs["return_residual"] = True
        velocity, *found = model(encoder_hidden_states=text, **kwargs, **inputs)
        if residuals.keep is not None:
            for sample, residual in zip(samples, found[0].to(text.dtype).split(1), strict=True):
                residuals.keep(*sample, residual)
        return velocity.float()


def _in_groups(predict: Run, passes: Passes) -> list[torch.Tensor]:
    """Run passes, those together that run the same blocks."""
    groups: dict[Any, dict[str, Pass]] = {}
    for name, run in passes.items():
        groups.setdefault((run.skip_layers, run.attention), {})[name] = run
    found: dict[str, torch.Tensor] = {}
    for group in groups.values():
        found |= zip(group, predict(group), strict=True)
    return [found[name] for name in passes]


def takes_samples_in_turn(model: Any) -> bool:
    """Whether a batch's samples go through a model's blocks in turn, each as in a call of its own.

    Step caches and the attention of others may depend on the order of calls.
    """
    if not is_ours(model) or not model.samples_in_turn or model.is_cache_enabled:
        return False
    return all(layer.attends_in_parts for block in model.blocks for layer in (block.attn1, block.attn2))


def _options_of_ours(runs: Sequence[Pass], videos: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments that only wan22's transformer has, for passes that have them in common."""
    skipped, attention = runs[0].skip_layers, runs[0].attention
    options: dict[str, Any] = {"skip_layers": skipped} if skipped else {}
    if attention is not None:
        negative = torch.cat([run.negative[list(videos)] for run in runs if run.negative is not None])
        options |= {"encoder_hidden_states_negative": negative.to(dtype), "attention_guidance": attention}
    return options


def _for_diffusers(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments as diffusers' model takes them: latents in its dtype, times for each token."""
    latents, timestep = inputs["hidden_states"], inputs["timestep"]
    if timestep.ndim == 2:
        _, rows, columns = model.config.patch_size
        timestep = timestep.repeat_interleave(latents[0, 0, 0, ::rows, ::columns].numel(), dim=1)
    return inputs | {"hidden_states": latents.to(model.dtype), "timestep": timestep}
