"""Which transformer serves a step, with what guidance, and what of it need not be loaded."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.builders import (
    SMALL,
    latents_of,
    random_components,
    random_i2v_pipeline,
    random_pipeline,
    recording,
)
from wan22 import FlowMatchEulerScheduler, WanT2VPipeline, WanTransformer3DModel
from wan22.pipelines.call.experts import Experts
from wan22.pipelines.call.guidance.guider import ClassifierFreeGuidance
from wan22.pipelines.call.guidance.scales import CheckedGuidance

# ---- the policy ----


def policy(boundary=875.0, high="high", low="low"):
    return Experts(SimpleNamespace(transformer=high, transformer_2=low), boundary)


def steps(timesteps):
    times = torch.tensor(timesteps, dtype=torch.float64)
    return policy().steps(SimpleNamespace(timesteps=times, sigmas=times / 1000))


@pytest.mark.parametrize(
    ("timestep", "slot"),
    [
        (1000, "transformer"),
        (876, "transformer"),
        (875, "transformer"),
        (875.0, "transformer"),
        (874.9, "transformer_2"),
        (874, "transformer_2"),
        (0, "transformer_2"),
    ],
)
def test_the_boundary_belongs_to_the_high_noise_expert(timestep, slot):
    assert policy().serving(timestep).slot == slot


def test_without_boundary_the_first_slot_serves_everything():
    experts = policy(boundary=None, low=None)
    assert [experts.serving(t).slot for t in (1000, 500, 1)] == ["transformer"] * 3
    assert experts.serving(1).label == ""


def test_steps():
    high, low = policy().high, policy().low
    assert (high.label, low.label) == ("high noise", "low noise")
    found = steps([999, 900, 500, 10])
    assert [step.expert for step in found] == [high, high, low, low]
    assert [step.next_expert for step in found] == [None, low, None, None]
    assert [(step.index, step.number, step.count, step.is_last) for step in found[::3]] == [
        (0, 1, 4, False),
        (3, 4, 4, True),
    ]
    assert [step.sigma for step in found] == [0.999, 0.9, 0.5, 0.01]


@pytest.mark.parametrize(
    ("scales", "timesteps", "guided"),
    [((1, 1), [999, 5], False), ((1, 2), [999, 5], True), ((1, 2), [999], False), ((2, 1), [5], False)],
)
def test_guided(scales, timesteps, guided):
    guidance = CheckedGuidance(ClassifierFreeGuidance(), *scales, None).over(steps(timesteps), 2)
    assert guidance.needs_negative(steps(timesteps)) is guided


# ---- in a call ----


def test_each_step_runs_its_expert(pipe):
    with recording(pipe) as calls:
        latents_of(pipe, num_inference_steps=4, guidance_scale=1.0, guidance_scale_2=1.0)
    served = [(name, t) for name, t in calls if name != "text_encoder"]
    assert [t for _, t in served] == [float(t) for t in pipe.scheduler.timesteps]
    assert [name for name, _ in served] == ["transformer" if t >= 875 else "transformer_2" for _, t in served]
    assert {name for name, _ in served} == {"transformer", "transformer_2"}


def test_a_timestep_on_the_boundary_in_a_call(pipe):
    with recording(pipe) as calls:
        latents_of(pipe, timesteps=[1000, 875, 874.5], guidance_scale=1.0, guidance_scale_2=1.0)
    assert calls[1:] == [("transformer", 1000.0), ("transformer", 875.0), ("transformer_2", 874.5)]


def test_another_boundary_ratio():
    pipe = random_pipeline(boundary_ratio=0.5)
    with recording(pipe) as calls:
        latents_of(pipe, timesteps=[900, 500, 499], guidance_scale=1.0, guidance_scale_2=1.0)
    assert [name for name, _ in calls[1:]] == ["transformer", "transformer", "transformer_2"]


def test_one_transformer_serves_all_steps(single_pipe):
    with recording(single_pipe) as calls:
        latents_of(single_pipe, guidance_scale=1.0)
    assert [name for name, _ in calls] == ["text_encoder"] + ["transformer"] * 3


@pytest.mark.parametrize(
    ("empty", "timesteps"), [("transformer_2", [1000, 900]), ("transformer", [800, 400])]
)
def test_a_slot_that_is_never_reached_may_be_empty(pipe, empty, timesteps):
    reference = latents_of(pipe, timesteps=timesteps)
    assert torch.equal(latents_of(random_pipeline(**{empty: None}), timesteps=timesteps), reference)


@pytest.mark.parametrize(
    ("empty", "label", "timestep"), [("transformer_2", "low noise", 400), ("transformer", "high noise", 1000)]
)
def test_a_slot_that_is_reached_must_be_loaded(empty, label, timestep):
    pipe = random_pipeline(**{empty: None})
    with (
        recording(pipe) as calls,
        pytest.raises(ValueError, match=f"timestep {timestep}.*{label}.*pipe.{empty}"),
    ):
        latents_of(pipe, timesteps=[1000, 400])
    assert not calls, "refused before any work"


def test_no_transformer_at_all():
    pipe = random_pipeline(transformer=None, transformer_2=None)
    with pytest.raises(ValueError, match="neither transformer nor transformer_2 is loaded"):
        latents_of(pipe)


# ---- components that do not belong together ----


def test_transformer_2_needs_a_boundary():
    with pytest.raises(ValueError, match=r"boundary_ratio is None.*0\.875"):
        latents_of(random_pipeline(boundary_ratio=None))
    with pytest.raises(ValueError, match=r"boundary_ratio is None.*0\.875"):
        WanT2VPipeline.from_pipe(random_pipeline(), boundary_ratio=None)


def test_a_vae_of_another_checkpoint():
    with pytest.raises(ValueError, match="predicts 16 latent channels, the VAE has 48"):
        random_pipeline(vae=random_components(1, 48)["vae"])


def test_encoders_of_another_width():
    other = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, ffn_dim=32, num_layers=1, text_dim=48
    )
    small = {name: value for name, value in SMALL.items() if name != "guidance_scale_2"}
    pipe = random_pipeline(experts=1, transformer=other)
    with pytest.raises(ValueError, match=r"text_encoder gives embeddings 32 wide.*takes 48 \(text_dim\)"):
        pipe("a", **small)
    embeds = torch.zeros(1, 7, 48)  # from elsewhere
    pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds, output_type="latent", **small)
    pipe = random_i2v_pipeline(experts=1)
    pipe.image_encoder = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16)
    )
    with pytest.raises(ValueError, match=r"image_encoder gives embeddings 16 wide.*takes 24 \(image_dim\)"):
        pipe(np.zeros((64, 64, 3), np.uint8), "a", **small)


@pytest.mark.parametrize("change", ["quantize", "compile", "set_attention_backend"])
def test_what_changes_the_transformers_needs_some(change):
    pipe = random_pipeline(vae=None, transformer=None, transformer_2=None)
    with pytest.raises(ValueError, match="neither transformer nor transformer_2 is loaded"):
        getattr(pipe, change)(*["int8"] * (change == "quantize"))


def test_an_image_to_video_transformer():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 32, "num_layers": 1}
    model = WanTransformer3DModel(in_channels=36, out_channels=16, text_dim=32, **sizes)
    with pytest.raises(ValueError, match=r"36 channels for 16.*image-to-video"):
        random_pipeline(transformer=model)


# ---- guidance ----


def model_calls(pipe, **arguments):
    with recording(pipe) as calls:
        latents_of(pipe, **arguments)
    return [name for name, _ in calls]


def test_guidance_runs_each_model_twice_and_the_encoder_twice(pipe):
    assert model_calls(pipe).count("text_encoder") == 2
    assert len(model_calls(pipe)) == 2 + 2 * 3


def test_guidance_1_never_touches_the_negative_prompt(pipe):
    arguments = {"guidance_scale": 1.0, "guidance_scale_2": 1.0}
    assert len(model_calls(pipe, **arguments)) == 1 + 3
    plain = latents_of(pipe, **arguments)
    assert torch.equal(plain, latents_of(pipe, negative_prompt="fog", **arguments))


def test_guidance_1_for_one_expert_only(pipe):
    calls = model_calls(pipe, timesteps=[1000, 900, 400], guidance_scale=1.0, guidance_scale_2=2.0)
    assert calls == ["text_encoder"] * 2 + ["transformer"] * 2 + ["transformer_2"] * 2


def test_guidance_only_where_no_step_goes_needs_no_negative_prompt(pipe):
    calls = model_calls(pipe, timesteps=[1000, 900], guidance_scale=1.0, guidance_scale_2=2.0)
    assert calls == ["text_encoder"] + ["transformer"] * 2


def test_guidance_scale_alone_serves_both_experts(pipe):
    alone = latents_of(pipe, guidance_scale=2.5, guidance_scale_2=None)
    assert torch.equal(alone, latents_of(pipe, guidance_scale=2.5, guidance_scale_2=2.5))
    assert not torch.equal(alone, latents_of(pipe, guidance_scale=2.5, guidance_scale_2=4.0))


def test_guidance_scale_is_of_the_high_noise_expert(pipe):
    """With high-noise steps only, the second scale changes nothing; with low-noise steps only, the first."""
    high = {"timesteps": [1000, 900]}
    assert torch.equal(
        latents_of(pipe, guidance_scale=4.0, guidance_scale_2=2.0, **high),
        latents_of(pipe, guidance_scale=4.0, guidance_scale_2=3.0, **high),
    )
    low = {"timesteps": [800, 400]}
    assert torch.equal(
        latents_of(pipe, guidance_scale=4.0, guidance_scale_2=2.0, **low),
        latents_of(pipe, guidance_scale=2.0, guidance_scale_2=2.0, **low),
    )


def test_guidance_scale_2_of_a_single_transformer(single_pipe):
    with pytest.raises(ValueError, match=r"guidance_scale_2=3\.0 is for checkpoints of two experts"):
        single_pipe("a", height=32, width=32, num_frames=5, guidance_scale_2=3.0)


def test_guidance_formula(pipe):
    """One Euler step is linear in the velocity, so the guided result is known from the two unguided ones."""
    pipe = random_pipeline(scheduler=FlowMatchEulerScheduler(), transformer_2=None)
    arguments = {"timesteps": [900.0], "guidance_scale_2": None}
    conditional = latents_of(pipe, "a", guidance_scale=1.0, **arguments)
    unconditional = latents_of(pipe, "b", guidance_scale=1.0, **arguments)
    guided = latents_of(pipe, "a", negative_prompt="b", guidance_scale=3.0, **arguments)
    expected = unconditional + 3 * (conditional - unconditional)
    assert torch.allclose(guided, expected, atol=2e-5)
    assert not torch.allclose(conditional, unconditional, atol=1e-3)
