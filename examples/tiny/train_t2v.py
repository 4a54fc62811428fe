"""Train the embedded checkpoint's text encoder and transformer, then one transformer per noise range.

    python examples/tiny/train_t2v.py --out runs/tiny

Reads runs/tiny/latents (cache_latents.py). There are three parts, of which `--part` runs one: `base` trains
text encoder and transformer over the whole noise range; `high` and `low` each start from it, keep the text
encoder, and train the expert of one side of the boundary (they may run at the same time). `--resume` goes on
from the last saved step. Started by `torchrun --nproc-per-node 2`, two processes share each step.

Axes: b batch, c channels, t h w latent frames, rows, columns, s text rows, d their width.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cache_latents import read_latents
from common import (
    Average,
    arguments,
    cosine,
    load,
    rank,
    save,
    set_learning_rate,
    share_gradients,
    wait_for_others,
    workers,
)
from muon import Muon
from tokenizer import make_tokenizer
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from wan22 import WanTransformer3DModel

TRANSFORMER_CONFIG: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 6}
TRANSFORMER_CONFIG |= {"in_channels": 16, "out_channels": 16, "text_dim": 64, "freq_dim": 256, "ffn_dim": 512}
TEXT_CONFIG: dict[str, Any] = {"d_model": 64, "d_kv": 32, "num_heads": 2, "d_ff": 128, "num_layers": 2}
TEXT_CONFIG |= {"dropout_rate": 0.0, "feed_forward_proj": "gated-gelu"}
TEXT_ROWS = 512  # rows the transformer attends to, zero past the prompt
SHIFT, BOUNDARY = 3.0, 0.875
BATCH, CAPTION_DROPOUT, EMA_DECAY = 32, 0.1, 0.998
SAVE_EVERY, READ_EVERY = 200, 200


@dataclass(frozen=True)
class Part:
    """One part of the training.

    Args:
        steps: optimizer steps.
        sigmas: lowest and highest noise level.
        lr: learning rate at the start.
        lr_end: learning rate at the end.
    """

    steps: int
    sigmas: tuple[float, float]
    lr: float
    lr_end: float


PARTS = {
    "base": Part(1000, (0.0, 1.0), 2e-3, 2e-3),
    "high": Part(3000, (BOUNDARY, 1.0), 2e-3, 0.0),
    "low": Part(3000, (0.0, BOUNDARY), 2e-3, 0.0),
}


class TextToVideo(nn.Module):
    """Text encoder and transformer, as they are trained together."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        config = UMT5Config(vocab_size=vocabulary, pad_token_id=0, eos_token_id=1, **TEXT_CONFIG)
        self.text_encoder = UMT5EncoderModel(config)
        self.transformer = WanTransformer3DModel(**TRANSFORMER_CONFIG)
        nn.init.zeros_(self.transformer.proj_out.weight)

    def text_rows(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode token ids "b s" into text rows "b s+1 d" and their attention bias "b s+1".

        The zero rows that fill up to TEXT_ROWS are identical, so one stands for all, exactly, with a bias of
        the logarithm of their number.
        """
        rows = self.text_encoder(ids, attention_mask=mask).last_hidden_state * mask[..., None]
        fillers = TEXT_ROWS - mask.sum(dim=1, keepdim=True)
        bias = torch.where(mask.bool(), 0.0, -math.inf)
        return F.pad(rows, (0, 0, 0, 1)), torch.cat((bias, fillers.log()), dim=1)

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Predict the velocity of latents "b c t h w" at noise levels "b" for token ids and mask "b s"."""
        rows, bias = self.text_rows(ids, mask)
        return self.transformer(x, sigma * 1000, rows, encoder_attention_bias=bias, return_dict=False)[0]


def make_optimizer(model: TextToVideo, part: str) -> Muon:
    """Muon for the blocks' matrices, AdamW for the rest; experts leave the text encoder as it is."""
    if part != "base":
        model.text_encoder.requires_grad_(False)
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            inner = "block" in name and p.ndim == 2 and "relative_attention_bias" not in name
            (matrices if inner else others).append(p)
    return Muon(matrices, others, lr=PARTS[part].lr)


def sample_sigmas(n: int, lowest: float, highest: float) -> torch.Tensor:
    """Sample n noise levels in random order: uniform before the shift, one in each n-th of the range."""
    low, high = (s / (SHIFT - (SHIFT - 1) * s) for s in (lowest, highest))  # undo the shift
    u = low + (high - low) * (torch.randperm(n) + torch.rand(n)) / n
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def spell(caption: str, rng: np.random.Generator) -> str:
    """Drop a caption now and then, or write it as people do: capital letter, full stop, capitals."""
    if rng.random() < CAPTION_DROPOUT:
        return ""
    if rng.random() < 0.15:
        caption = caption[0].upper() + caption[1:]
    if rng.random() < 0.15:
        caption += "."
    return caption.upper() if rng.random() < 0.02 else caption


def tokenize(tokenizer: Any, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, "b s", padded to the longest caption."""
    tokens = tokenizer(list(captions), padding=True, return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


def loss_of(
    model: TextToVideo, x0: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Return the flow-matching loss of each sample, "b": squared error of the velocity, noise − x0."""
    noise = torch.randn_like(x0)
    s = sigma[:, None, None, None, None]
    velocity = model((1 - s) * x0 + s * noise, sigma, ids, mask)
    return (velocity - (noise - x0)).square().flatten(1).mean(dim=1)


@torch.no_grad()
def held_out_loss(
    model: TextToVideo, latents: torch.Tensor, captions: list[str], tokenizer: Any, part: Part
) -> float:
    """Return the mean loss over held-out clips, with the same noise each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sigma = sample_sigmas(len(captions), *part.sigmas)
        return loss_of(model, latents.float(), sigma, *tokenize(tokenizer, captions)).mean().item()


def train(part_name: str, options: argparse.Namespace) -> None:
    """Run one part and write its averaged weights to <part>.pt."""
    part, path = PARTS[part_name], options.out / f"{part_name}.pt"
    steps = 2 if options.smoke else options.steps or part.steps
    torch.manual_seed(options.seed)  # the same weights in every process
    tokenizer = make_tokenizer()
    model = TextToVideo(len(tokenizer))
    if part_name != "base":
        model.load_state_dict(load(options.out / "base.pt")["average"])
    optimizer, average, first = make_optimizer(model, part_name), Average(model, EMA_DECAY), 0
    if options.resume and path.exists():
        state = load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights, average.steps, first = state["average"], state["step"], state["step"]
    rng = np.random.default_rng([options.seed, first, rank()])
    torch.manual_seed(int(rng.integers(2**31)))
    held_out = load(options.out / "latents" / "held_out.pt")
    test = held_out["latents"][:128], held_out["captions"][:128]
    started, losses = time.time(), []

    for step in range(first, steps):
        if step == first or step % READ_EVERY == 0:
            latents, captions = read_latents(options.out / "latents")
        set_learning_rate(optimizer, cosine(step, steps, part.lr, part.lr_end, warmup=100))
        chosen = rng.integers(len(captions), size=BATCH)
        ids, mask = tokenize(tokenizer, [spell(captions[i], rng) for i in chosen])
        loss = loss_of(model, latents[chosen].float(), sample_sigmas(BATCH, *part.sigmas), ids, mask).mean()
        optimizer.zero_grad()
        loss.backward()
        share_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        losses.append(loss.detach())
        if rank() == 0 and ((step + 1) % SAVE_EVERY == 0 or step + 1 == steps):
            averaged = TextToVideo(len(tokenizer))
            averaged.load_state_dict(average.weights)
            print(
                f"{part_name} step {step + 1}/{steps}: loss {torch.stack(losses).mean():.4f}, "
                f"held out {held_out_loss(averaged, *test, tokenizer, part):.4f}, {len(captions)} clips, "
                f"{len(losses) * BATCH * workers() / (time.time() - started):.1f} samples/s",
                flush=True,
            )
            started, losses = time.time(), []
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(path, state | {"average": average.weights, "step": step + 1})
    wait_for_others()


def main() -> None:
    """Train the parts asked for, one after the other."""
    options = arguments(__doc__, "resume", "smoke", seed=0, part="all", steps=0)
    for name in PARTS if options.part == "all" else (options.part,):
        train(name, options)


if __name__ == "__main__":
    main()
