"""Facts about each released checkpoint: the sizes that identify it, and its official settings."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

# The official code's default, used wherever the negative prompt is empty.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
# Text tokens that transformers attend to. They are trained on exactly this many, zero past the prompt: fewer
# tokens, or masked ones, change the result (relative errors of 5e-2 and 0.47).
MAX_TEXT_TOKENS = 512


@dataclass(frozen=True)
class Preset:
    """One released checkpoint: its sizes and its official settings.

    Args:
        repo: hub repository in the Diffusers layout; "" if the checkpoint ships inside this package.
        dim: the transformer's model size, heads times head size.
        in_channels: the transformer's input channels.
        boundary_ratio: timesteps at or above this share of 1000 use the high-noise expert; None for one
            transformer.
        flow_shift: shift of the noise schedule.
        guidance_scale: guidance of the high-noise expert, or of the only transformer.
        guidance_scale_2: guidance of the low-noise expert; None for one transformer.
        width, height: pixels.
        num_frames: 1 + a multiple of 4.
        fps: frames per second.
        negative_prompt: replaces an empty negative prompt.
        two_frames: the transformer attends to the image tokens of a first and a last frame (Wan 2.1 FLF).
        gigabytes: size of all weights, in bfloat16 but for the VAE's float32.

    Source: Wan2.2 wan/configs, Wan2.1 wan/configs, generate.py and its README.
    """

    name: str
    repo: str
    dim: int
    in_channels: int
    boundary_ratio: float | None
    num_inference_steps: int
    flow_shift: float
    guidance_scale: float
    guidance_scale_2: float | None
    width: int
    height: int
    num_frames: int = 81
    fps: int = 16
    negative_prompt: str = NEGATIVE_PROMPT
    two_frames: bool = False
    gigabytes: float = 0.0

    @property
    def experts(self) -> int:
        """Number of transformers, 1 or 2."""
        return 1 if self.boundary_ratio is None else 2


T2V_A14B = Preset(
    name="Wan2.2-T2V-A14B",
    repo="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    dim=5120,
    in_channels=16,
    boundary_ratio=0.875,
    num_inference_steps=40,
    flow_shift=12.0,
    guidance_scale=4.0,
    guidance_scale_2=3.0,
    width=1280,
    height=720,
    gigabytes=69.0,
)
I2V_A14B = Preset(
    name="Wan2.2-I2V-A14B",
    repo="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    dim=5120,
    in_channels=36,
    boundary_ratio=0.900,
    num_inference_steps=40,
    flow_shift=5.0,
    guidance_scale=3.5,
    guidance_scale_2=3.5,
    width=1280,
    height=720,
    gigabytes=69.0,
)
TI2V_5B = Preset(
    name="Wan2.2-TI2V-5B",
    repo="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    dim=3072,
    in_channels=48,
    boundary_ratio=None,
    num_inference_steps=50,
    flow_shift=5.0,
    guidance_scale=5.0,
    guidance_scale_2=None,
    width=1280,
    height=704,
    num_frames=121,
    fps=24,
    gigabytes=24.2,
)
T2V_1_3B = Preset(
    name="Wan2.1-T2V-1.3B",
    repo="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    dim=1536,
    in_channels=16,
    boundary_ratio=None,
    num_inference_steps=50,
    flow_shift=8.0,
    guidance_scale=6.0,
    guidance_scale_2=None,
    width=832,
    height=480,
    gigabytes=14.7,
)
T2V_14B = Preset(
    name="Wan2.1-T2V-14B",
    repo="Wan-AI/Wan2.1-T2V-14B-Diffusers",
    dim=5120,
    in_channels=16,
    boundary_ratio=None,
    num_inference_steps=50,
    flow_shift=5.0,
    guidance_scale=5.0,
    guidance_scale_2=None,
    width=1280,
    height=720,
    gigabytes=40.5,
)
# The 480P and the 720P checkpoint have one configuration; these settings suit both.
I2V_14B = Preset(
    name="Wan2.1-I2V-14B",
    repo="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    dim=5120,
    in_channels=36,
    boundary_ratio=None,
    num_inference_steps=40,
    flow_shift=3.0,
    guidance_scale=5.0,
    guidance_scale_2=None,
    width=832,
    height=480,
    gigabytes=46.0,
)
FLF_14B = Preset(
    name="Wan2.1-FLF2V-14B",
    repo="Wan-AI/Wan2.1-FLF2V-14B-720P-Diffusers",
    dim=5120,
    in_channels=36,
    boundary_ratio=None,
    num_inference_steps=50,
    flow_shift=16.0,
    guidance_scale=5.0,
    guidance_scale_2=None,
    width=1280,
    height=720,
    two_frames=True,
    gigabytes=46.0,
)
TINY_T2V = Preset(
    name="tiny-t2v",
    repo="",
    dim=128,
    in_channels=16,
    boundary_ratio=0.875,
    num_inference_steps=20,
    flow_shift=3.0,
    guidance_scale=4.0,
    guidance_scale_2=3.0,
    width=64,
    height=64,
    num_frames=17,
    fps=8,
    negative_prompt="",
    gigabytes=0.01,
)
TINY_I2V = replace(TINY_T2V, name="tiny-i2v", in_channels=36, boundary_ratio=0.900)
TINY_TI2V = replace(
    TINY_T2V,
    name="tiny-ti2v",
    in_channels=48,
    boundary_ratio=None,
    guidance_scale_2=None,
    width=128,
    height=128,
)
# What diffusers' conversion script writes as flow_shift for every Wan checkpoint but TI2V-5B, right or not.
CONVERTED_FLOW_SHIFT = 3.0
PRESETS = (
    *(T2V_A14B, I2V_A14B, TI2V_5B, T2V_1_3B, T2V_14B, I2V_14B, FLF_14B),
    *(TINY_T2V, TINY_I2V, TINY_TI2V),
)


def has_timestep_per_token(config: Mapping[str, Any]) -> bool:
    """Return whether a transformer of this configuration takes one timestep per token, as TI2V-5B's does."""
    return config["in_channels"] == config["out_channels"] == TI2V_5B.in_channels


def release_of(config: Mapping[str, Any], experts: int) -> Preset:
    """Return the released checkpoint with a transformer of this configuration, or the one closest to it."""
    preset = find_preset(
        dim=config["num_attention_heads"] * config["attention_head_dim"],
        in_channels=config["in_channels"],
        experts=experts,
        two_frames=config["pos_embed_seq_len"] is not None,
    )
    return preset or closest_preset(in_channels=config["in_channels"], experts=experts)


def find_preset(*, dim: int, in_channels: int, experts: int, two_frames: bool = False) -> Preset | None:
    """Return the released checkpoint of exactly these sizes, or None. `Preset` describes the sizes."""
    wanted = (dim, in_channels, experts, two_frames)
    return next((p for p in PRESETS if (p.dim, p.in_channels, p.experts, p.two_frames) == wanted), None)


def closest_preset(*, in_channels: int, experts: int) -> Preset:
    """Return the release whose settings suit an unknown size: the same channels, and experts if possible."""
    family = [p for p in PRESETS if p.repo and p.in_channels == in_channels] or [T2V_14B]
    return next((p for p in family if p.experts == experts), family[0])
