"""Negative prompts without a second pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....checkpoints.loading.diffusers_attention import WanAttnProcessor
from ....checkpoints.loading.models import is_ours
from ....checks import check_real
from ....models.attention_guidance import AttentionGuidance
from ..experts import Step
from .guider import Guider, PassSettings


@dataclass(frozen=True)
class NAG(Guider):
    """Normalized attention guidance: cross-attention keeps away from the negative prompt, in one pass.

    The way to a negative prompt for distilled checkpoints, and at half the time of plain guidance for all.
    It runs at a guidance scale of 1; with a second pass the negative prompt would count twice. The formula is
    that of `wan22.models.attention_guidance.AttentionGuidance`.

    Args:
        scale: how far away, 1 or more; 1 changes nothing.
        tau: limit of the result's L1 norm, as a multiple of the prompt's own; above 0.
        alpha: share of the result, 0 to 1, the rest being the prompt's own.

    Source: arXiv 2505.21179; ChenDarYen/Normalized-Attention-Guidance.
    """

    name = "nag"

    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25

    def __post_init__(self) -> None:
        check_real("scale", self.scale, 1, hint="1 changes nothing")
        check_real("tau", self.tau, 0, above=True, hint="such as 2.5")
        check_real("alpha", self.alpha, 0, 1)

    @property
    def own_scale(self) -> float:
        """1: there is no second pass."""
        return 1.0

    def check(self, models: Sequence[Any]) -> None:
        """Refuse transformers of others, and attention processors of others."""
        for model in models:
            if not is_ours(model):
                raise ValueError(
                    f"guidance='nag' works within wan22's own transformer, not in diffusers' "
                    f"{type(model).__name__}; load it with wan22.WanTransformer3DModel"
                )
            for block in model.blocks:
                if type(processor := block.attn2.processor) is not WanAttnProcessor:
                    raise ValueError(
                        f"guidance='nag' is not known to the attention processor {type(processor).__name__}; "
                        "set_attn_processor(WanAttnProcessor()) takes it away"
                    )

    def passes(self, step: Step, scale: float, since: int | None) -> Mapping[str, PassSettings]:
        """Return the only pass, with its attention guided."""
        return {"cond": PassSettings(attention=AttentionGuidance(self.scale, self.tau, self.alpha))}
