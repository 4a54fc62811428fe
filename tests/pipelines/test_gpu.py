"""The same answers on a GPU as on the CPU, and what only a GPU can show."""

import copy

import pytest
import torch

from tests import builders
from tests.golden_data import relative_error
from wan22 import WanT2VPipeline, tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
PROMPT = "a red circle moves to the right on a blue background"


def load(**kwargs):
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint("t2v"), **{"dtype": torch.float32} | kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, **kwargs):
    return pipe(PROMPT, output_type="latent", **{"seed": 3} | kwargs).frames.cpu()


def test_a_seed_means_the_same_video_on_cpu_and_gpu():
    assert relative_error(latents(load().to("cuda")), latents(load())) <= 1e-3


def test_model_offload_gives_the_same_video_and_leaves_the_gpu_empty():
    plain = latents(load().to("cuda"))
    pipe = load()
    pipe.enable_model_cpu_offload()
    assert torch.equal(latents(pipe), plain)
    assert pipe(PROMPT, seed=3, num_inference_steps=2).frames.shape == (1, 17, 64, 64, 3)
    models = (pipe.transformer, pipe.transformer_2, pipe.text_encoder, pipe.vae)
    assert all(p.device.type == "cpu" for model in models for p in model.parameters())


def test_noise_of_the_device():
    pipe = load().to("cuda")
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])

    given = torch.randn(16, 5, 8, 8, generator=torch.Generator("cuda").manual_seed(3), device="cuda")
    drawn = latents(pipe, noise_device="cuda", callback_on_step_end=keep, num_inference_steps=2)
    assert torch.equal(drawn, latents(pipe, latents=given[None], seed=None, num_inference_steps=2))
    assert seen[0].is_cuda


def test_bf16_runs_and_stays_close():
    exact, rounded = latents(load().to("cuda")), latents(load(dtype=torch.bfloat16).to("cuda"))
    assert relative_error(rounded, exact) <= 0.1


def test_random_pipeline_on_gpu():
    own = {name: copy.deepcopy(part) for name, part in builders.random_components().items()}
    pipe = builders.random_pipeline(**own).to("cuda")
    video = pipe("a", **builders.SMALL, seed=0)
    assert video.frames.shape == (1, 5, 32, 32, 3)
