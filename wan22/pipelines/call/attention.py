"""Refuses sparse self-attention that would not suit a call, before any work, and says what it leaves out."""

from typing import Any

from ...accel.sparse.settings import Grid, SparseAttention, sparse_attention_of
from ...checkpoints.loading.diffusers_attention import WanAttnProcessor
from ...checkpoints.loading.models import is_ours
from ...checks import shown
from .request import Request


def checked_attention(pipe: Any, request: Request, grid: Grid) -> SparseAttention | None:
    """Return the sparse self-attention of a call of videos with a grid "t h w" of tokens.

    Raises: ValueError: it cannot go together with the models, the ranks or the size.
    """
    attention = sparse_attention_of(request.attention)
    if attention is None:
        return None
    method = shown(attention.method)
    for model in pipe.transformers:
        if not is_ours(model):
            raise ValueError(
                f"attention={method} works within wan22's own transformer, not in diffusers' "
                f"{type(model).__name__}; load it with wan22.WanTransformer3DModel"
            )
        for block in model.blocks:
            if type(processor := block.attn1.processor) is not WanAttnProcessor:
                raise ValueError(
                    f"attention={method} is not known to the attention processor {type(processor).__name__}; "
                    "set_attn_processor(WanAttnProcessor()) takes it away"
                )
    if pipe.parallel is not None and (ring := pipe.parallel.layout.ring) > 1:
        raise ValueError(
            f"attention={method} needs all keys at once, and ring={ring} has them pass by; share heads by "
            "ulysses=, or passes by cfg=2"
        )
    attention.check_grid(grid)
    return attention


def described(attention: SparseAttention, grid: Grid, pipe: Any, steps: int) -> str:
    """Return what sparse self-attention computes, in words."""
    layers = pipe.any_transformer.config.num_layers
    first, layer = attention.first_step(steps), attention.dense_layers
    if first >= steps or layer >= layers:
        return f"{attention.method} attention: dense in all steps and layers, by its settings"
    share = f"{100 * attention.share(grid):.0f} % of self-attention's blocks"
    where = f"{steps - first} of {steps} steps and {layers - layer} of {layers} layers"
    return f"{attention.method} attention computes {share} in {where}"
