"""Train the embedded checkpoints' text encoder and transformers, part by part.

    python examples/tiny/train_transformer.py --out runs/tiny --part base

Reads the encoded clips (cache_latents.py), writes <part>.pt. `base` trains text encoder and transformer over
the whole noise range. All other parts start from another one's averaged weights, see PARTS, and keep its text
encoder: `high` and `low`, the experts of text to video; `i2v-high` and `i2v-low`, those of image to video;
`ti2v`, one transformer for both, in the other autoencoder's latents. Parts that do not need each other may
run at the same time. `--resume` goes on from the last saved step. Started by `torchrun --nproc-per-node 2`,
two processes share each step.

Axes: b batch, c channels, t h w latent frames, rows, columns, s text tokens, d their width, l video tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cache_latents import FOLDERS, read_latents
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
from train_vae import CONFIGS
from transformers import UMT5Config, UMT5EncoderModel

from wan22 import WanTransformer3DModel

TRANSFORMER_CONFIG: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 6}
TRANSFORMER_CONFIG |= {"text_dim": 64, "freq_dim": 256, "ffn_dim": 512}
TEXT_CONFIG: dict[str, Any] = {"d_model": 64, "d_kv": 32, "num_heads": 2, "d_ff": 128, "num_layers": 2}
TEXT_CONFIG |= {"dropout_rate": 0.0, "feed_forward_proj": "gated-gelu"}
MAX_TEXT_TOKENS = 512  # tokens the transformer attends to, zero past the prompt
T2V_BOUNDARY, I2V_BOUNDARY = 0.875, 0.900
LAST_FRAME = 0.35  # share of clips with the last frame given, too (i2v)
FIRST_FRAME = 0.5  # share of clips with the first frame given (ti2v)
BATCH, CAPTION_DROPOUT, EMA_DECAY = 32, 0.1, 0.998
SAVE_EVERY, READ_EVERY, TEST_CLIPS = 200, 200, 128


# ---- what is given beside the text ----

Clips = dict[str, torch.Tensor]  # the tensors of read_latents
# From clips and their noise levels "b" to levels per latent frame, "b t", or "b 1" for all frames alike; and
# to what the transformer gets in channels after the noisy ones, "b c t h w" (c may be 0).
Condition = Callable[[Clips, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def text_alone(clips: Clips, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give nothing: T2V-A14B."""
    return sigma[:, None], clips["latents"][:, :0]


def frames_in_channels(clips: Clips, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the first frame, or the first and the last, as I2V-A14B takes them: a mask, then the latents."""
    both = torch.rand(len(sigma)) < LAST_FRAME
    given = torch.where(both[:, None, None, None, None], clips["both"], clips["first"])
    b, _, t, h, w = given.shape
    mask = given.new_zeros(b, 4, t, h, w)  # a channel for each of the 4 frames of a latent frame
    mask[:, :, 0] = 1  # the first latent frame is one frame
    mask[both, -1, -1] = 1
    return sigma[:, None], torch.cat((mask, given), dim=1)


def first_frame_in_place(clips: Clips, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give half of the clips their first latent frame, free of noise, as TI2V-5B takes it.

    The autoencoder is causal: a clip's first latent frame is that of its first frame encoded alone.
    """
    levels = sigma[:, None].repeat(1, clips["latents"].shape[2])
    levels[torch.rand(len(sigma)) < FIRST_FRAME, 0] = 0
    return levels, clips["latents"][:, :0]


# ---- parts ----


@dataclass(frozen=True)
class Part:
    """One part of the training.

    Args:
        steps: optimizer steps.
        sigmas: lowest and highest noise level.
        lr: learning rate at the start.
        lr_end: learning rate at the end.
        start: the part whose averaged weights it starts from.
        shift: shift of the training noise levels; higher values favour high noise.
        vae: the autoencoder whose latents it learns, see train_vae.CONFIGS.
        in_channels: the transformer's input channels, latents and condition.
        condition: kind of input beside the text.
    """

    steps: int
    sigmas: tuple[float, float]
    lr: float
    lr_end: float
    start: str | None = None
    shift: float = 3.0
    vae: str = "vae"
    in_channels: int = 16
    condition: Condition = text_alone


T2V_EXPERT = partial(Part, lr=2e-3, lr_end=0.0, start="base")
I2V_EXPERT = partial(Part, 1500, lr=1e-3, lr_end=0.0, in_channels=36, condition=frames_in_channels)
TI2V = partial(Part, vae="vae22", in_channels=48, condition=first_frame_in_place)
PARTS = {
    "base": Part(1000, (0.0, 1.0), 2e-3, 2e-3),
    "high": T2V_EXPERT(6000, (T2V_BOUNDARY, 1.0)),  # motion is decided there
    "low": T2V_EXPERT(3000, (0.0, T2V_BOUNDARY)),
    "i2v-high": I2V_EXPERT((I2V_BOUNDARY, 1.0), start="high"),
    "i2v-low": I2V_EXPERT((0.0, I2V_BOUNDARY), start="low"),
    "ti2v": TI2V(6000, (0.0, 1.0), 2e-3, 0.0, start="base", shift=5.0),
}


# ---- model ----


class VideoModel(nn.Module):
    """Text encoder and transformer, as they are trained together."""

    def __init__(self, vocabulary: int, part: Part) -> None:
        super().__init__()
        config = UMT5Config(vocab_size=vocabulary, pad_token_id=0, eos_token_id=1, **TEXT_CONFIG)
        self.text_encoder = UMT5EncoderModel(config)
        channels = {"in_channels": part.in_channels, "out_channels": CONFIGS[part.vae]["z_dim"]}
        self.transformer = WanTransformer3DModel(**TRANSFORMER_CONFIG, **channels)
        nn.init.zeros_(self.transformer.proj_out.weight)

    def embed_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Encode token ids "b s" into "b 512 d", zero past the prompt's end."""
        embeds = self.text_encoder(ids, attention_mask=mask).last_hidden_state * mask[..., None]
        return F.pad(embeds, (0, 0, 0, MAX_TEXT_TOKENS - embeds.shape[1]))

    def forward(
        self, x: torch.Tensor, levels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Predict the velocity of latents.

        Args:
            x: latents with their condition, "b c t h w".
            levels: noise levels, "b 1", or "b t" for one per latent frame.
            ids: token ids, "b s".
            mask: which of them count, "b s".
        Returns: velocity, "b c t h w", c without the condition's.
        """
        timestep = levels * 1000
        if levels.shape[1] > 1:
            _, rows_each, columns_each = self.transformer.config.patch_size
            tokens = (x.shape[3] // rows_each) * (x.shape[4] // columns_each)  # of one latent frame
            timestep = timestep.repeat_interleave(tokens, dim=1)  # b l
        return self.transformer(x, timestep, self.embed_text(ids, mask), return_dict=False)[0]


def adopt(model: VideoModel, weights: dict[str, torch.Tensor]) -> None:
    """Start a model from another part's weights, in place; what has another shape there stays as it is.

    Where both predict the same latents, the input channels that the other part lacks start without influence.
    """
    own = model.state_dict()
    head, tail = "transformer.patch_embedding.weight", "transformer.proj_out.weight"
    if own[tail].shape == weights[tail].shape:
        missing = own[head].shape[1] - weights[head].shape[1]
        weights = weights | {head: F.pad(weights[head], (0, 0) * 3 + (0, missing))}
    model.load_state_dict(own | {name: w for name, w in weights.items() if w.shape == own[name].shape})


def make_optimizer(model: VideoModel, part: Part) -> Muon:
    """Muon for the blocks' matrices, AdamW for the rest; only the first part trains the text encoder."""
    model.text_encoder.requires_grad_(part.start is None)
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            inner = "block" in name and p.ndim == 2 and "relative_attention_bias" not in name
            (matrices if inner else others).append(p)
    return Muon(matrices, others, lr=part.lr)


# ---- training ----


def sample_sigmas(n: int, part: Part) -> torch.Tensor:
    """Sample n noise levels in random order: uniform before the shift, one in each n-th of the range."""
    low, high = (s / (part.shift - (part.shift - 1) * s) for s in part.sigmas)  # undo the shift
    u = low + (high - low) * (torch.randperm(n) + torch.rand(n)) / n
    return part.shift * u / (1 + (part.shift - 1) * u)


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


def pick(clips: Clips, chosen: np.ndarray | slice) -> Clips:
    """Return some of the clips, in float32."""
    return {name: x[chosen].float() for name, x in clips.items()}


def loss_of(
    model: VideoModel,
    condition: Condition,
    clips: Clips,
    sigma: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Return the flow-matching loss of each clip, "b": squared error of the velocity, noise − x0.

    Latent frames that are given, at noise level 0, do not count.
    """
    x0 = clips["latents"]
    levels, channels = condition(clips, sigma)
    noise = torch.randn_like(x0)
    s = levels[:, None, :, None, None]
    velocity = model(torch.cat(((1 - s) * x0 + s * noise, channels), dim=1), levels, ids, mask)
    error = (velocity - (noise - x0)).square().mean(dim=(1, 3, 4))  # b t
    counts = (levels > 0).expand_as(error)
    # At least 1: a noise level drawn as exactly 0 must not make the loss infinite.
    return (error * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)


@torch.no_grad()
def held_out_loss(
    model: VideoModel, part: Part, clips: Clips, tokens: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """Return the mean loss over held-out clips, with the same noise each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sigma = sample_sigmas(len(clips["latents"]), part)
        return loss_of(model, part.condition, clips, sigma, *tokens).mean().item()


def train(name: str, options: argparse.Namespace) -> None:
    """Run one part and write its averaged weights to <part>.pt."""
    part, path = PARTS[name], options.out / f"{name}.pt"
    steps = 2 if options.smoke else options.steps or part.steps
    torch.manual_seed(options.seed)  # the same weights in every process
    tokenizer = make_tokenizer()
    model, averaged = (VideoModel(len(tokenizer), part) for _ in range(2))
    if part.start:
        adopt(model, load(options.out / f"{part.start}.pt")["average"])
    optimizer, average, first = make_optimizer(model, part), Average(model, EMA_DECAY), 0
    if options.resume and path.exists():
        state = load(path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights, average.steps, first = state["average"], state["step"], state["step"]
    rng = np.random.default_rng([options.seed, first, rank()])
    torch.manual_seed(int(rng.integers(2**31)))
    in_channels = part.condition is frames_in_channels
    read = partial(read_latents, options.out / FOLDERS[part.vae], conditions=in_channels)
    test_clips, test_captions = read("held_out.pt")
    test = pick(test_clips, slice(TEST_CLIPS)), tokenize(tokenizer, test_captions[:TEST_CLIPS])
    started, losses = time.time(), []

    for step in range(first, steps):
        if step == first or step % READ_EVERY == 0:
            clips, captions = read()
        set_learning_rate(optimizer, cosine(step, steps, part.lr, part.lr_end, warmup=100))
        chosen = rng.integers(len(captions), size=BATCH)
        tokens = tokenize(tokenizer, [spell(captions[i], rng) for i in chosen])
        sigma = sample_sigmas(BATCH, part)
        loss = loss_of(model, part.condition, pick(clips, chosen), sigma, *tokens).mean()
        optimizer.zero_grad()
        loss.backward()
        share_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        losses.append(loss.detach())
        if rank() == 0 and ((step + 1) % SAVE_EVERY == 0 or step + 1 == steps):
            averaged.load_state_dict(average.weights)
            print(
                f"{name} step {step + 1}/{steps}: loss {torch.stack(losses).mean():.4f}, "
                f"held out {held_out_loss(averaged, part, *test):.4f}, {len(captions)} clips, "
                f"{len(losses) * BATCH * workers() / (time.time() - started):.1f} samples/s",
                flush=True,
            )
            started, losses = time.time(), []
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(path, state | {"average": average.weights, "step": step + 1})
    wait_for_others()


if __name__ == "__main__":
    options = arguments(__doc__, "resume", "smoke", seed=0, part="base", steps=0)
    train(options.part, options)
