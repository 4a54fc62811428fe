"""Compiled blocks and chunks: the same result, compiled no more often than needed."""

import copy
import gc
import weakref

import diffusers
import pytest
import torch

from tests.builders import (
    latents_of,
    random_components,
    random_i2v_pipeline,
    random_pipeline,
    random_ti2v_pipeline,
)
from tests.checkpoints.lora_writers import make_lora, save
from tests.golden_data import relative_error
from tests.models.vaes import tiny_vae
from tests.tiers import slow
from wan22.accel.compile import Compiled
from wan22.models.rope import rotary_tables

MODELS = ("transformer", "transformer_2", "vae")


class Counting:
    """A backend that counts the graphs it gets and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def pipe():
    torch._dynamo.reset()
    return random_pipeline(**{name: copy.deepcopy(random_components()[name]) for name in MODELS})


def test_one_compilation_for_all_layers_experts_and_prompts(pipe):
    plain = latents_of(pipe)
    counting = Counting()
    pipe.compile(backend=counting)
    assert relative_error(latents_of(pipe), plain) <= 2e-6
    assert counting.graphs == 1
    latents_of(pipe, "a prompt of quite another length, which says more", guidance_scale=1.5)
    assert counting.graphs == 1
    latents_of(pipe, width=64)
    assert counting.graphs > 1  # one graph cannot serve all sizes, or the counting would not work
    pipe.uncompile()
    assert pipe.compiled is None
    assert torch.equal(latents_of(pipe), plain)
    assert "forward" not in vars(pipe.transformer.blocks[0])


@pytest.mark.parametrize("form", [random_i2v_pipeline, *slow([random_ti2v_pipeline])], ids=["i2v", "ti2v"])
def test_image_to_video(form):
    torch._dynamo.reset()
    names = [n for n in MODELS if getattr(form(), n) is not None]
    pipe = form(**{name: copy.deepcopy(getattr(form(), name)) for name in names})
    arguments = {"image": torch.rand(3, 32, 32), "prompt": "a", "seed": 7}
    arguments |= {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3}
    plain = [pipe(**arguments, output_type=kind).frames for kind in ("latent", "pt")]
    counting = Counting()
    pipe.compile(vae=True, backend=counting)
    assert relative_error(pipe(**arguments, output_type="latent").frames, plain[0]) <= 2e-6
    assert relative_error(pipe(**arguments, output_type="pt").frames, plain[1]) <= 1e-5
    graphs = counting.graphs
    pipe(**arguments)
    assert counting.graphs == graphs
    pipe.uncompile()
    assert torch.equal(pipe(**arguments, output_type="pt").frames, plain[1])


def test_a_lora_strength_recompiles_once_and_never_again(pipe, tmp_path):
    """At its first change the number becomes a variable, in each graph."""
    pipe.load_lora_weights(save(make_lora(pipe.transformer, 1), tmp_path / "a.safetensors"), adapter_name="a")
    plain = {}
    for strength in (1.0, 0.3):
        pipe.set_adapters("a", strength)
        plain[strength] = latents_of(pipe)
    counting = Counting()
    pipe.compile(backend=counting)
    assert relative_error(latents_of(pipe), plain[0.3]) <= 2e-6
    first = counting.graphs
    pipe.set_adapters("a", 0.7)
    latents_of(pipe)
    graphs = counting.graphs
    assert graphs <= 2 * first
    pipe.set_adapters("a", 1.0)
    assert relative_error(latents_of(pipe), plain[1.0]) <= 2e-6
    assert counting.graphs == graphs


@pytest.mark.slow
def test_what_is_compiled_by_inductor_is_the_same(pipe):
    """A whole block by the real compiler."""
    block = pipe.transformer.blocks[0]
    rotary = rotary_tables((2, 4, 4), 24, torch.device("cpu"))
    inputs = (torch.randn(1, 32, 48), torch.randn(1, 6, 48), torch.randn(1, 1, 6, 48), rotary)
    with torch.no_grad():
        plain = block(*inputs)
        compiled = Compiled([pipe.transformer])
        assert "forward" in vars(block)
        assert relative_error(block(*inputs), plain) <= 1e-6
        compiled.detach()
        assert torch.equal(block(*inputs), plain)


def test_the_vae_is_compiled_where_it_is_asked_for(pipe):
    for vae in (False, True):
        pipe.compile(backend=Counting(), **({"vae": True} if vae else {}))
        assert ("forward" in vars(pipe.vae.decoder)) == vae
    pipe.uncompile()


def test_another_number_of_frames_compiles_no_chunk():
    """A chunk's strides do not depend on the clip that it was cut from."""
    torch._dynamo.reset()
    model, counting = tiny_vae("2.1"), Counting()
    compiled = Compiled([], model, backend=counting)
    graphs = []
    for latents in (4, 6, 9):
        list(model.decode_stream(torch.randn(1, model.z_dim, latents, 4, 4)))
        list(model.encode_stream([torch.rand(1, 3, 4 * latents - 3, 32, 32)]))
        graphs.append(counting.graphs)
    compiled.detach()
    assert graphs[0] == graphs[1] == graphs[2]


def test_more_sizes_than_the_compilers_limit(pipe):
    """With variable sizes switched off, each size compiles anew; the ninth did not run."""
    block = pipe.transformer.blocks[0]
    counting = Counting()
    compiled = Compiled([pipe.transformer], dynamic=False, backend=counting)
    with torch.no_grad():
        for t in range(1, 11):
            rotary = rotary_tables((t, 2, 2), 24, torch.device("cpu"))
            block(torch.randn(1, 4 * t, 48), torch.randn(1, 6, 48), torch.randn(1, 1, 6, 48), rotary)
    assert counting.graphs == 10
    compiled.detach()


def test_a_step_cache_that_is_there_already_is_refused(pipe):
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"WanTransformerBlock\.forward is replaced already"):
        pipe.compile(vae=True, backend=Counting())
    assert pipe.compiled is None
    assert "forward" not in vars(pipe.vae.decoder)
    pipe.transformer.disable_cache()
    pipe.compile(vae=True, backend=Counting())


def test_accelerated_when_compiled(pipe):
    plain = latents_of(pipe, output_type="pt")
    pipe.compile(vae=True, backend="eager")
    pipe.accelerate()
    assert relative_error(latents_of(pipe, output_type="pt"), plain) <= 1e-5
    pipe.decelerate()
    pipe.uncompile()
    assert torch.equal(latents_of(pipe, output_type="pt"), plain)


def test_compiling_twice_is_compiling_anew(pipe):
    pipe.compile(vae=True, backend=Counting())
    pipe.compile(vae=True, backend=Counting())
    pipe.uncompile()
    assert "forward" not in vars(pipe.vae.decoder)


def test_a_step_cache_that_came_later_is_not_lost(pipe):
    plain = latents_of(pipe)
    pipe.compile(vae=True, backend=Counting())
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    cached = pipe.transformer.blocks[0].forward
    with pytest.raises(
        ValueError, match=r"WanTransformerBlock\.forward has been replaced.*disable_cache\(\)"
    ):
        pipe.uncompile()
    assert pipe.transformer.blocks[0].forward is cached
    assert "forward" in vars(pipe.vae.decoder)
    pipe.transformer.disable_cache()
    pipe.uncompile()
    assert torch.equal(latents_of(pipe), plain)


def test_nothing_of_it_outlives_the_models():
    model = tiny_vae("2.1")
    Compiled([], model, backend="eager")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune"},
        {"backend": "cudagraphs"},
        {"options": {"triton.cudagraphs": True}},
    ],
    ids=str,
)
def test_cuda_graphs_are_refused(pipe, options):
    with pytest.raises(ValueError, match=r"CUDA graphs.*mode='max-autotune-no-cudagraphs'"):
        pipe.compile(**options)
    assert "forward" not in vars(pipe.vae.decoder)
    Compiled([pipe.transformer], mode="max-autotune-no-cudagraphs").detach()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu(pipe):
    pipe.to("cuda")
    plain = latents_of(pipe)
    pipe.compile()
    assert relative_error(latents_of(pipe).cpu(), plain.cpu()) <= 1e-4
    pipe.uncompile()
    assert torch.equal(latents_of(pipe), plain)
