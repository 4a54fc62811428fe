"""Train the embedded checkpoints' autoencoders: still images first, then clips.

    python examples/tiny/train_vae.py --out runs/tiny --vae vae

Writes runs/tiny/vae in the Diffusers layout; `--vae vae22` writes the autoencoder of the 2.2 family instead.
`--resume` goes on from runs/tiny/vae.pt, saved every 100 steps.

Axes: b batch, c channels, t h w frames, rows, columns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import clips
import numpy as np
import torch
import torch.nn.functional as F
from common import Average, arguments, cosine, load, prefetch, save, set_learning_rate
from muon import Muon
from torch import nn

from wan22 import AutoencoderKLWan
from wan22.models.autoencoder_layers import CausalConv3d, RMSNorm

CONFIGS: dict[str, dict[str, Any]] = {
    "vae": {"base_dim": 8, "dim_mult": [1, 2, 4, 8], "z_dim": 16, "num_res_blocks": 1},
    "vae22": {"base_dim": 16, "dim_mult": [1, 2, 4, 4], "z_dim": 48, "num_res_blocks": 1},
}
CONFIGS["vae22"] |= {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
CONFIGS["vae22"] |= {"scale_factor_spatial": 16}
# Layers whose convolutions look back in time: the lowest resolution's, whose place the family decides. At
# higher resolutions only the weights of the current frame are trained, the rest stay zero: motion is slow
# there, and a third of the work remains.
TEMPORAL_LAYERS = (
    "encoder.mid_block",
    "encoder.conv_out",
    "decoder.conv_in",
    "decoder.mid_block",
    "decoder.up_blocks.0",
)
LOWEST_DOWN_BLOCK = {"vae": "encoder.down_blocks.6", "vae22": "encoder.down_blocks.3"}
KL_WEIGHT, SQUARE_WEIGHT, EMA_DECAY = 1e-4, 5.0, 0.998
SAVE_EVERY = 100


@dataclass(frozen=True)
class Stage:
    """One part of the training.

    Args:
        steps: optimizer steps.
        batch: clips per step.
        frames: frames of a clip.
        size: height and width in pixels, twice as many for the 2.2 family, whose latents are twice as coarse;
            everything is drawn smaller in a smaller frame.
        lr: learning rate at the start.
        lr_end: learning rate at the end.
        decoder_only: leave the encoder, and so the latents, as they are.
    """

    steps: int
    batch: int
    frames: int
    size: int
    lr: float
    lr_end: float
    decoder_only: bool = False


STAGES = (
    Stage(800, 32, 1, 32, 3e-3, 1.5e-3),
    Stage(600, 6, 9, 32, 2e-3, 1e-3),
    Stage(350, 2, 17, 64, 1.5e-3, 1e-5),
    Stage(300, 2, 17, 64, 1e-3, 1e-5, decoder_only=True),  # may run while the transformer trains
)
SMOKE_STAGES = (Stage(2, 2, 1, 16, 3e-3, 1e-3), Stage(2, 2, 5, 16, 1e-3, 1e-5, decoder_only=True))


class FrameConv(nn.Module):
    """A causal convolution whose weights for earlier frames are zero, computed frame by frame.

    It takes a CausalConv3d's place for the time of the training, and holds its parameters under their names.
    """

    def __init__(self, conv: CausalConv3d) -> None:
        super().__init__()
        self.weight, self.bias, self.padding = conv.weight, conv.bias, conv.padding[1:]

    def forward(self, x: torch.Tensor, cache: None = None) -> torch.Tensor:
        """Convolve "b c t h w" to "b c t h w"."""
        frames = x.transpose(1, 2).flatten(0, 1)  # (b t) c h w
        frames = F.conv2d(frames, self.weight[:, :, -1], self.bias, padding=self.padding)
        return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class FusedRMSNorm(nn.Module):
    """The autoencoder's norm by PyTorch's kernel over the last axis, which has a fast backward on CPU."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.gamma = norm.gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over dimension 1."""
        return F.rms_norm(x.movedim(1, -1), self.gamma.shape[:1], self.gamma.flatten(), 1e-12).movedim(-1, 1)


def speed_up(vae: AutoencoderKLWan, temporal_layers: tuple[str, ...] = ()) -> AutoencoderKLWan:
    """Swap layers for equivalent ones that are faster on CPU, in place; parameters and their names stay.

    Args:
        vae: the autoencoder.
        temporal_layers: beginnings of the names of layers to leave alone although they do not look back yet.
    Returns: vae.
    """
    for name, layer in list(vae.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(layer, RMSNorm):
            setattr(vae.get_submodule(parent), child, FusedRMSNorm(layer))
        elif isinstance(layer, CausalConv3d) and layer.kernel_size[1] > 1:
            looks_back = layer.weight[:, :, :-1].any() or name.startswith(temporal_layers or "-")
            if not looks_back:
                setattr(vae.get_submodule(parent), child, FrameConv(layer))
    return vae


@torch.no_grad()
def initialize(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Start as if there were no time, in place: each layer sees one frame, repeats it, or averages two."""
    for layer in vae.modules():
        if not isinstance(layer, nn.Conv3d) or layer.kernel_size[0] == 1:
            continue
        if layer.kernel_size[1] > 1:
            layer.weight[:, :, :-1] = 0
            continue
        identity = torch.eye(layer.in_channels)
        layer.weight.zero_()
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        if layer.out_channels == layer.in_channels:  # downsampling: two frames become one
            layer.weight[:, :, 1, 0, 0] = layer.weight[:, :, 2, 0, 0] = identity / 2
        else:  # upsampling: one frame becomes two
            layer.weight[:, :, 2, 0, 0] = identity.repeat(2, 1)
    z_dim = vae.config.z_dim
    vae.quant_conv.weight[z_dim:] *= 0.1
    vae.quant_conv.bias[z_dim:] = -6.0  # type: ignore[index] # little noise on the latents at first
    return vae


def make_optimizer(vae: AutoencoderKLWan) -> Muon:
    """Muon for the inner convolutions, AdamW for the first, the last, norms and biases."""
    outer = {vae.encoder.conv_in.weight, vae.decoder.conv_out.weight}
    trained = [p for p in vae.parameters() if p.requires_grad]
    inner = {p for p in trained if p.ndim >= 4 and min(p.shape[:2]) > 1} - outer
    return Muon([p for p in trained if p in inner], [p for p in trained if p not in inner], lr=STAGES[0].lr)


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    """Turn uint8 "b t h w c" into "b c t h w" in [-1, 1], with channels innermost in memory for speed."""
    x = torch.from_numpy(frames).float() / 127.5 - 1
    return x.permute(0, 4, 1, 2, 3).contiguous(memory_format=torch.channels_last_3d)


def moments(vae: AutoencoderKLWan, x: torch.Tensor) -> torch.Tensor:
    """Return mean and log variance of the latents of whole clips "b c t h w", "b 2c t h w"."""
    return vae.quant_conv(vae.encode_chunk(x))


def loss_of(vae: AutoencoderKLWan, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training loss of clips "b c t h w" and their mean squared error on the scale 0 to 1."""
    mean, logvar = moments(vae, x).chunk(2, dim=1)
    logvar = logvar.clamp(-20, 4)
    z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    error = vae.decode_chunk(vae.post_quant_conv(z)) - x  # not clamped, unlike vae.decode
    square = error.square().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + SQUARE_WEIGHT * square + KL_WEIGHT * kl, square.detach() / 4


@torch.no_grad()
def round_trip(vae: AutoencoderKLWan, frames: np.ndarray) -> torch.Tensor:
    """Return each clip's PSNR in dB after encoding to the posterior mean and decoding, "b"."""
    errors = []
    for part in np.array_split(frames, max(1, len(frames) // 8)):
        x = to_pixels(part)
        y = vae.decode(vae.encode(x, chunk_latents=None).latent_dist.mode(), chunk_latents=None).sample
        errors.append(((x - y) / 2).square().mean(dim=(1, 2, 3, 4)))
    return -10 * torch.cat(errors).log10()


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, n: int, seed: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each latent channel over n training clips."""
    rng = np.random.default_rng(seed)
    size = pixels(vae)
    batches = [clips.draw_batch(rng, min(8, n), size=size)[0] for _ in range(max(1, n // 8))]
    z = torch.cat([vae.encode(to_pixels(b), chunk_latents=None).latent_dist.mode() for b in batches])
    mean, std = z.mean(dim=(0, 2, 3, 4)), z.std(dim=(0, 2, 3, 4))
    return [round(v, 4) for v in mean.tolist()], [round(v, 4) for v in std.tolist()]


def averaged(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> AutoencoderKLWan:
    """Return a plain autoencoder with these weights."""
    vae = AutoencoderKLWan.from_config(config)
    vae.load_state_dict(weights)
    return vae.eval()


def pixels(vae: AutoencoderKLWan, size: int = clips.SIZE) -> int:
    """Return the height and width that stand for `size` pixels of the 4x8x8 autoencoder."""
    return size * vae.spatial_stride // 8


def batches(stage: Stage, size: int, seed: list[int]) -> Iterator[np.ndarray]:
    """Yield uint8 training clips "b t h w c" of one stage for ever."""
    rng = np.random.default_rng(seed)
    draw = partial(clips.draw_batch, rng, stage.batch, size=size, frames=stage.frames)
    return prefetch(lambda: draw()[0])


def train(
    vae: AutoencoderKLWan, number: int, stage: Stage, seed: int, path: Path, state: dict[str, Any]
) -> None:
    """Run one stage; afterwards vae holds the averaged weights.

    Args:
        vae: the autoencoder, changed in place.
        number: number of the stage.
        stage: settings of the stage.
        seed: seed of the clips.
        path: file for checkpoints.
        state: the checkpoint to go on from, or empty.
    """
    vae.encoder.requires_grad_(not stage.decoder_only)
    vae.quant_conv.requires_grad_(not stage.decoder_only)
    optimizer, average, first = make_optimizer(vae), Average(vae, EMA_DECAY), 0
    if state:
        optimizer.load_state_dict(state["optimizer"])
        average.weights, average.steps, first = state["average"], state["step"], state["step"]
    started, squares, size = time.time(), [], pixels(vae, stage.size)
    rng = np.random.default_rng(7)
    held_out = clips.draw_batch(rng, 16, "held_out", size=size, frames=stage.frames)[0]
    stream = batches(stage, size, [seed, number, first])
    for step in range(first, stage.steps):
        set_learning_rate(optimizer, cosine(step, stage.steps, stage.lr, stage.lr_end))
        loss, square = loss_of(vae, to_pixels(next(stream)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(vae)
        squares.append(square)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == stage.steps:
            training = -10 * torch.stack(squares).mean().log10()
            speed = len(squares) * stage.batch / (time.time() - started)
            test = round_trip(speed_up(averaged(average.weights, vae.config)), held_out).mean()
            print(
                f"stage {number} step {step + 1}/{stage.steps}: training {training:.2f} dB, "
                f"held out {test:.2f} dB, {speed:.1f} clips/s",
                flush=True,
            )
            started, squares = time.time(), []
            state = {"model": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save(path, state | {"average": average.weights, "stage": number, "step": step + 1})
    vae.load_state_dict(average.weights)


def main() -> None:
    """Run all stages, then write the averaged weights with the latents' statistics."""
    options = arguments(__doc__, "resume", "smoke", seed=0, vae="vae")
    torch.manual_seed(options.seed)
    stages = SMOKE_STAGES if options.smoke else STAGES
    vae = initialize(AutoencoderKLWan(**CONFIGS[options.vae]))
    speed_up(vae, (*TEMPORAL_LAYERS, LOWEST_DOWN_BLOCK[options.vae]))
    path, state, first = options.out / f"{options.vae}.pt", {}, 0
    if options.resume and path.exists():
        state = load(path)
        vae.load_state_dict(state["model"])
        first = state["stage"]
    for number in range(first, len(stages)):
        train(vae, number, stages[number], options.seed, path, state)
        state = {}

    mean, std = latent_statistics(vae.eval(), 4 if options.smoke else 512, options.seed)
    # Of what the config marks as default values, from_config takes the defaults, whatever stands there.
    statistics = {"latents_mean": mean, "latents_std": std, "_use_default_values": []}
    final = averaged(vae.state_dict(), {**vae.config, **statistics})
    final.save_pretrained(options.out / options.vae)
    n, rng = 4 if options.smoke else 64, np.random.default_rng(8)
    held_out = clips.draw_batch(rng, n, "held_out", size=pixels(vae))[0]
    test = round_trip(speed_up(final), held_out)
    print(f"round trip of held-out clips: mean {test.mean():.2f} dB, lowest {test.min():.2f} dB")
    print(f"latent standard deviations: {std}")


if __name__ == "__main__":
    main()
