"""Ways to compute less, in pairs: each keeps its promises beside the other, or the pair is refused."""

import copy
from itertools import product

import pytest
import torch

from tests.builders import SMALL, random_pipeline
from tests.pipelines.call.caches.loops import CALL, RATIOS
from wan22 import EasyCache, FewSteps, MagCache, RadialAttention, TaylorCache
from wan22.guidance import NAG, Gated, SkipLayer

# Each skips steps of both experts, or none at all.
CACHES = {
    "easy": (EasyCache(0.3, warmup=0), EasyCache(0, warmup=0)),
    "mag": (MagCache(0.2, warmup=0, ratios=RATIOS), MagCache(0, warmup=0, ratios=RATIOS)),
    "taylor": (TaylorCache(3, warmup=0), TaylorCache(1, warmup=0)),
}
GUIDANCE = {
    "cfg-zero*": {"guidance": "cfg-zero*"},
    "apg": {"guidance": "apg"},
    "rescale": {"guidance": "rescale"},
    "gated": {"guidance": Gated(after=0.3, refresh=3)},
    "gated apg": {"guidance": Gated("apg", after=0.3, refresh=None)},
    "slg": {"guidance": SkipLayer(layers=1, start=0, stop=1)},
    "nag": {"guidance": NAG(), "guidance_scale": 1.0, "guidance_scale_2": None},
    "interval": {"guidance_interval": (0.2, 0.8)},
}

# The rows and columns of half of the steps are half as many.
FEWER_TOKENS = {"resolution_schedule": [(0.5, 0.5)]}
# It leaves out some of 40 tokens, from the first step on.
SPARSE = {"attention": RadialAttention(0.1, block=2, dense_steps=0), "width": 64, "num_frames": 17}
DENSE = {**SPARSE, "attention": None}


def latents(pipe, prompt="a", **arguments):
    given = {**SMALL, **CALL, "seed": 7, "output_type": "latent", **arguments}
    return pipe(prompt, **given)


@pytest.mark.parametrize(("cache", "guidance"), product(CACHES, GUIDANCE))
def test_caches_and_guidance(cache, guidance):
    pipe, (skipping, nothing) = random_pipeline(), CACHES[cache]
    exact = latents(pipe, **GUIDANCE[guidance])
    assert torch.equal(latents(pipe, **GUIDANCE[guidance], cache=nothing).frames, exact.frames)
    video = latents(pipe, **GUIDANCE[guidance], cache=skipping)
    ((computed, of),) = video.recipe.passes
    assert computed < of and video.frames.isfinite().all()
    assert not torch.equal(video.frames, exact.frames)
    together = latents(pipe, ["b", "a"], **GUIDANCE[guidance], cache=skipping, seed=[3, 7])
    assert torch.equal(together.frames[1:], video.frames)
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


def quantised(text):
    """A pipeline whose transformers are its own, quantised."""
    own = random_pipeline()
    models = {slot: copy.deepcopy(getattr(own, slot)) for slot in ("transformer", "transformer_2")}
    pipe = random_pipeline(**models)
    pipe.quantize(text)
    return pipe


@pytest.mark.parametrize("text", ["int8:low", "fp8:high:keep=1,0"])
@pytest.mark.parametrize("cache", CACHES)
def test_caches_and_quantised_experts(cache, text):
    pipe, (skipping, nothing) = quantised(text), CACHES[cache]
    exact = latents(pipe)
    assert not torch.equal(exact.frames, latents(random_pipeline()).frames)
    assert torch.equal(latents(pipe, cache=nothing).frames, exact.frames)
    video = latents(pipe, cache=skipping)
    ((computed, of),) = video.recipe.passes
    assert computed < of and not torch.equal(video.frames, exact.frames)
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


@pytest.mark.parametrize("guidance", ["apg", "gated", "slg", "nag"])
def test_guidance_and_quantised_experts(guidance):
    pipe = quantised("int8:low")
    video = latents(pipe, **GUIDANCE[guidance])
    whole = latents(random_pipeline(), **GUIDANCE[guidance])
    assert 0 < (video.frames - whole.frames).norm() / whole.frames.norm() < 0.05
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


def test_few_steps_and_quantised_experts():
    pipe = quantised("int8:low")
    given = {"distilled": FewSteps((1000, 900, 700, 400)), "num_inference_steps": None, "flow_shift": None}
    given |= {"guidance_scale": None, "guidance_scale_2": None}
    video = latents(pipe, **given)
    whole = latents(random_pipeline(), **given)
    assert 0 < (video.frames - whole.frames).norm() / whole.frames.norm() < 0.05
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_few_steps_and_guidance(guidance):
    """A table's own scales take part where the formula is guided, and NAG works without."""
    pipe = random_pipeline()
    given = {"distilled": FewSteps((1000, 900, 700, 400)), "num_inference_steps": None, "flow_shift": None}
    chosen = {"guidance_scale": 3.0, "guidance_scale_2": None, **GUIDANCE[guidance]}
    video = latents(pipe, **given, **chosen)
    assert video.frames.isfinite().all()
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


@pytest.mark.parametrize("cache", CACHES)
def test_few_steps_and_caches_are_refused(cache):
    given = {"distilled": FewSteps((1000, 900)), "num_inference_steps": None, "flow_shift": None}
    with pytest.raises(ValueError, match="cache= and distilled=: each of so few steps counts"):
        latents(random_pipeline(), **given, cache=CACHES[cache][0])


@pytest.mark.parametrize("cache", CACHES)
def test_sparse_attention_and_caches(cache):
    pipe, (skipping, nothing) = random_pipeline(), CACHES[cache]
    every = latents(pipe, **SPARSE)
    assert torch.equal(latents(pipe, **SPARSE, cache=nothing).frames, every.frames)
    video = latents(pipe, **SPARSE, cache=skipping)
    ((computed, of),) = video.recipe.passes
    assert computed < of and not torch.equal(video.frames, every.frames)
    assert not torch.equal(video.frames, latents(pipe, **DENSE, cache=skipping).frames)
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_sparse_attention_and_guidance(guidance):
    pipe, given = random_pipeline(), {**GUIDANCE[guidance], "num_inference_steps": 4}
    video = latents(pipe, **given, **SPARSE)
    assert video.frames.isfinite().all()
    assert not torch.equal(video.frames, latents(pipe, **given, **DENSE).frames)
    together = latents(pipe, ["b", "a"], **given, **SPARSE, seed=[3, 7])
    assert torch.equal(together.frames[1:], video.frames)
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


def test_sparse_attention_and_few_steps():
    """The first of four steps stays dense."""
    pipe = random_pipeline()
    given = {"distilled": FewSteps((1000, 900, 700, 400)), "num_inference_steps": None, "flow_shift": None}
    given |= {"guidance_scale": None, "guidance_scale_2": None}
    sparse = {**SPARSE, "attention": RadialAttention(0.1, block=2)}
    video = latents(pipe, **given, **sparse)
    assert not torch.equal(video.frames, latents(pipe, **given, **DENSE).frames)
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


@pytest.mark.parametrize("cache", CACHES)
def test_fewer_tokens_and_caches(cache):
    pipe, (skipping, nothing) = random_pipeline(), CACHES[cache]
    exact = latents(pipe, **FEWER_TOKENS)
    assert torch.equal(latents(pipe, **FEWER_TOKENS, cache=nothing).frames, exact.frames)
    video = latents(pipe, **FEWER_TOKENS, cache=skipping)
    ((computed, of),) = video.recipe.passes
    assert computed < of and video.frames.isfinite().all()
    together = latents(pipe, ["b", "a"], **FEWER_TOKENS, cache=skipping, seed=[3, 7])
    assert torch.equal(together.frames[1:], video.frames)
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_fewer_tokens_and_guidance(guidance):
    """Beside a step cache as well."""
    pipe = random_pipeline()
    for cache in (None, CACHES["easy"][0]):
        video = latents(pipe, **FEWER_TOKENS, **GUIDANCE[guidance], cache=cache)
        assert video.frames.isfinite().all()
        together = latents(pipe, ["b", "a"], **FEWER_TOKENS, **GUIDANCE[guidance], cache=cache, seed=[3, 7])
        assert torch.equal(together.frames[1:], video.frames)
        assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)


def test_few_steps_and_fewer_tokens_are_refused():
    given = {"distilled": FewSteps((1000, 900)), "num_inference_steps": None, "flow_shift": None}
    with pytest.raises(ValueError, match="resolution_schedule= and distilled=: each of so few steps counts"):
        latents(random_pipeline(), **given, **FEWER_TOKENS)


def test_sparse_attention_and_fewer_tokens():
    """Each size has a mask of its own."""
    pipe = random_pipeline()
    video = latents(pipe, **FEWER_TOKENS, **SPARSE)
    assert video.frames.isfinite().all()
    assert not torch.equal(video.frames, latents(pipe, **FEWER_TOKENS, **DENSE).frames)
    assert torch.equal(pipe.reproduce(video.recipe, output_type="latent").frames, video.frames)
