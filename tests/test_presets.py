"""The released checkpoints' facts, and how a loaded one is told."""

import dataclasses

import pytest
import torch

from tests.builders import random_pipeline
from wan22 import WanI2VPipeline, WanT2VPipeline, WanTransformer3DModel, presets
from wan22.presets import PRESETS, closest_preset, find_preset

# Wan2.2 wan/configs and Wan2.1 wan/configs; guidance is (high, low noise), the official tuples are reversed.
# name: dim, in_channels, boundary, shift, steps, guidance, fps, frames, width, height
TABLE = {
    "Wan2.2-T2V-A14B": (5120, 16, 0.875, 12.0, 40, (4.0, 3.0), 16, 81, 1280, 720),
    "Wan2.2-I2V-A14B": (5120, 36, 0.900, 5.0, 40, (3.5, 3.5), 16, 81, 1280, 720),
    "Wan2.2-TI2V-5B": (3072, 48, None, 5.0, 50, (5.0, None), 24, 121, 1280, 704),
    "Wan2.1-T2V-1.3B": (1536, 16, None, 8.0, 50, (6.0, None), 16, 81, 832, 480),
    "Wan2.1-T2V-14B": (5120, 16, None, 5.0, 50, (5.0, None), 16, 81, 1280, 720),
    "Wan2.1-I2V-14B": (5120, 36, None, 3.0, 40, (5.0, None), 16, 81, 832, 480),
    "Wan2.1-FLF2V-14B": (5120, 36, None, 16.0, 50, (5.0, None), 16, 81, 1280, 720),
}
REPOS = {name: f"Wan-AI/{name}-Diffusers" for name in TABLE} | {
    "Wan2.1-I2V-14B": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "Wan2.1-FLF2V-14B": "Wan-AI/Wan2.1-FLF2V-14B-720P-Diffusers",
}
HEADS = {5120: 40, 3072: 24, 1536: 12}


@pytest.mark.parametrize("name", TABLE)
def test_facts(name):
    dim, in_channels, boundary, shift, steps, guidance, fps, frames, width, height = TABLE[name]
    experts = 1 if boundary is None else 2
    preset = find_preset(dim=dim, in_channels=in_channels, experts=experts, two_frames="FLF" in name)
    assert preset is not None
    assert preset.name == name
    assert preset.repo == REPOS[name]
    assert preset.boundary_ratio == boundary
    assert preset.flow_shift == shift
    assert preset.num_inference_steps == steps
    assert (preset.guidance_scale, preset.guidance_scale_2) == guidance
    assert (preset.fps, preset.num_frames) == (fps, frames)
    assert (preset.width, preset.height) == (width, height)
    assert preset.negative_prompt == presets.NEGATIVE_PROMPT


def test_every_release_is_in_the_table():
    assert {preset.name for preset in PRESETS if preset.repo} == set(TABLE)
    assert [preset.name for preset in PRESETS if not preset.repo] == ["tiny-t2v", "tiny-i2v", "tiny-ti2v"]


def test_the_negative_prompt_is_the_official_one():
    parts = presets.NEGATIVE_PROMPT.split("，")
    assert len(parts) == 28
    assert (parts[0], parts[12], parts[-1]) == ("色调艳丽", "低质量", "倒着走")
    assert "JPEG压缩残留" in parts
    assert not set(presets.NEGATIVE_PROMPT) & set(" \n,")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_a_recipe_can_be_run(preset):
    multiple = 32 if preset.in_channels == 48 else 16
    assert preset.width % multiple == preset.height % multiple == 0
    assert (preset.num_frames - 1) % 4 == 0
    assert preset.guidance_scale >= 1
    assert (preset.boundary_ratio is None) == (preset.guidance_scale_2 is None)


def test_no_two_presets_look_the_same():
    keys = [(p.dim, p.in_channels, p.experts, p.two_frames) for p in PRESETS]
    assert len(set(keys)) == len(keys)


def test_presets_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        presets.T2V_A14B.flow_shift = 3.0


@pytest.mark.parametrize(
    ("dim", "in_channels", "experts"),
    [(256, 16, 2), (3072, 16, 1), (3072, 48, 2), (1536, 36, 1), (1536, 16, 2)],
)
def test_unknown_checkpoints(dim, in_channels, experts):
    assert find_preset(dim=dim, in_channels=in_channels, experts=experts) is None


@pytest.mark.parametrize(
    ("in_channels", "experts", "name"),
    [
        (16, 2, "Wan2.2-T2V-A14B"),
        (36, 2, "Wan2.2-I2V-A14B"),
        (36, 1, "Wan2.1-I2V-14B"),
        (48, 1, "Wan2.2-TI2V-5B"),
        (48, 2, "Wan2.2-TI2V-5B"),
    ],
)
def test_closest(in_channels, experts, name):
    assert closest_preset(in_channels=in_channels, experts=experts).name == name


def test_closest_of_one_transformer():
    preset = closest_preset(in_channels=16, experts=1)
    assert preset.boundary_ratio is None
    assert preset.in_channels == 16


def test_closest_of_unknown_channels():
    assert closest_preset(in_channels=20, experts=1) in PRESETS


@pytest.mark.parametrize(
    ("name", "own_boundary"),
    [*((name, None) for name in TABLE), ("Wan2.2-T2V-A14B", 0.9), ("Wan2.2-I2V-A14B", 0.5)],
)
def test_a_pipeline_knows_its_release(name, own_boundary):
    """By the configs alone: the transformer has the release's sizes, no layers, and is on "meta"."""
    dim, channels, boundary, *_ = TABLE[name]
    boundary = own_boundary or boundary  # any value will do where there is one
    out = 48 if channels == 48 else 16
    with torch.device("meta"):
        transformer = WanTransformer3DModel(
            num_attention_heads=HEADS[dim],
            in_channels=channels,
            out_channels=out,
            ffn_dim=8,
            num_layers=0,
            image_dim=8 if "2.1-I2V" in name or "FLF" in name else None,
            pos_embed_seq_len=8 if "FLF" in name else None,
        )
    cls = WanT2VPipeline if channels == out else WanI2VPipeline
    rest = random_pipeline(experts=1, channels=out).components
    pipe = cls(**{**rest, "transformer": transformer}, boundary_ratio=boundary, expand_timesteps=out == 48)
    assert pipe.preset.name == pipe.checkpoint_name == name
