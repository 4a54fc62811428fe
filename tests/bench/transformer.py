"""One transformer block at its real width beside diffusers' own: the same weights, the same answer.

    python -m tests.bench.transformer

Both get what their own pipelines give them. In a bf16 model that is a float32 residual stream and float32
modulation here, a bf16 stream and bf16 modulation there. Ours is accelerated, where no row says "as loaded".
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from diffusers.models.transformers.transformer_wan import WanTransformerBlock as TheirBlock
from torch import nn

from tests.bench.harness import DTYPES, Row, Settings, compare, main, relative_error
from wan22 import WanTransformer3DModel
from wan22.models.rope import rotary_tables
from wan22.models.transformer import WanTransformerBlock
from wan22.presets import MAX_TEXT_TOKENS

Weights = dict[str, torch.Tensor]
HEAD_DIM = 128
GRIDS = {512: (2, 16, 16), 1024: (4, 16, 16)}
# What a bf16 model of ours holds in float32, and one of diffusers'.
OURS_WIDE = WanTransformer3DModel._keep_in_fp32_modules
THEIRS_WIDE = ("scale_shift_table", "norm1", "norm2", "norm3")


@dataclass(frozen=True)
class Width:
    """Sizes of a released checkpoint's block."""

    name: str
    dim: int
    ffn_dim: int

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.dim // HEAD_DIM


A14B = Width("A14B block", 5120, 13824)
TI2V_5B = Width("TI2V-5B block", 3072, 14336)


def random_weights(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> Weights:
    """Draw weights for a module on the meta device, of a size that keeps activations as large as they are."""
    generator, weights = torch.Generator(device).manual_seed(0), {}
    for name, parameter in module.named_parameters():
        is_gain = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
        fan_in = 100 if is_gain or parameter.ndim == 1 else parameter[0].numel()
        values = torch.randn(parameter.shape, generator=generator, device=device) * fan_in**-0.5
        weights[name] = (values + is_gain).to(dtype)
    return weights


def fill(module: nn.Module, weights: Weights, wide: Collection[str]) -> None:
    """Give a module on the meta device its weights; those under the names in `wide` become float32."""
    state = {name: w.float() if set(wide) & set(name.split(".")) else w for name, w in weights.items()}
    module.load_state_dict(state, assign=True)
    module.eval().requires_grad_(False)


def random_blocks(width: Width, dtype: torch.dtype) -> tuple[WanTransformerBlock, TheirBlock]:
    """Return our block and theirs with the same random weights."""
    with torch.device("meta"):
        ours = WanTransformerBlock(width.dim, width.ffn_dim, width.heads, True, 1e-6)
        theirs = TheirBlock(width.dim, width.ffn_dim, width.heads, cross_attn_norm=True, eps=1e-6)
    weights = random_weights(ours, "cpu", dtype)
    fill(ours, weights, OURS_WIDE)
    fill(theirs, weights, THEIRS_WIDE)
    return ours, theirs


@dataclass(frozen=True)
class Case:
    """What a pair of blocks is given.

    Args:
        dtype: of the model.
        tokens: of the video, one of GRIDS.
        times: values of time: None is one for the sample; 1 (text) and 2 (a given first frame) are those of
            TI2V-5B, of which diffusers makes one row per token.
    """

    dtype: torch.dtype
    tokens: int
    times: int | None = None

    def calls(
        self, ours: WanTransformerBlock, theirs: TheirBlock
    ) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
        """Return a call of our block and the same of theirs."""
        dim, dtype = ours.scale_shift_table.shape[2], self.dtype
        grid = GRIDS[self.tokens]
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(1, self.tokens, dim, generator=generator).to(dtype)
        text = torch.randn(1, MAX_TEXT_TOKENS, dim, generator=generator).to(dtype)
        rows = (torch.randn(1, self.times or 1, 6, dim, generator=generator) * 0.1).to(dtype)
        frames = rows[:, [0] + [-1] * (grid[0] - 1)]  # b t 6 d: the first frame's time, the others'
        per_token = frames.repeat_interleave(self.tokens // grid[0], dim=1)

        our_time = (frames if self.times == 2 else rows).float()
        our_rotary = rotary_tables(grid, HEAD_DIM, x.device)
        stream = x.float()

        their_time = rows[:, 0] if self.times is None else per_token
        t, h, w = grid
        their_rotary = WanRotaryPosEmbed(HEAD_DIM, (1, 2, 2), 1024)(torch.empty(1, 1, t, 2 * h, 2 * w))
        return (
            lambda: ours(stream, text, our_time, our_rotary),
            lambda: theirs(x, text, their_time, their_rotary),
        )


A14B_CASES = (
    (Case(torch.float32, 512), 1.0),
    (Case(torch.bfloat16, 1024), 1.0),
)
TI2V_5B_CASES = (
    (Case(torch.bfloat16, 1024, times=1), 1.05),
    (Case(torch.bfloat16, 1024, times=2), 1.05),
)
MODES = {None: "", 1: ", text mode", 2: ", image mode"}


@torch.no_grad()
def run(settings: Settings) -> list[Row]:
    """Compare blocks; quick: only the cases with a target."""
    rows = []
    for width, cases in ((A14B, A14B_CASES), (TI2V_5B, TI2V_5B_CASES)):
        blocks, held = None, None
        for case, target in cases:
            if settings.quick and target is None:
                continue
            if held != case.dtype:
                blocks = None  # the first pair's memory is free before the second is made
                blocks, held = random_blocks(width, case.dtype), case.dtype
            assert blocks is not None, "made above, as the first case has a dtype"
            ours, theirs = case.calls(*blocks)
            rows.append(
                compare(
                    width.name + MODES[case.times],
                    ours,
                    theirs,
                    settings,
                    target,
                    dtype=DTYPES[case.dtype],
                    shape=f"{case.tokens} tokens",
                    note=f"difference {relative_error(ours(), theirs()):.1e}",
                )
            )
    return rows


if __name__ == "__main__":
    main(run, __doc__)
