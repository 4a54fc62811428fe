"""Calls with sparse self-attention: which steps and layers it is in, what goes with it, what is refused."""

import copy
import logging
from types import SimpleNamespace

import diffusers
import pytest
import torch

from tests.accel.features import CHANGING, FORMS, SAME, own
from tests.builders import SMALL, TEXT_DIM, bf16_pipeline, random_i2v_pipeline, random_pipeline
from tests.checkpoints.lora_writers import make_lora, save
from tests.fake_card import FakeCard
from tests.golden_data import relative_error
from tests.tiers import slow
from wan22 import FlowMatchEulerScheduler, RadialAttention
from wan22.accel.parallel.mesh import Layout

# 5 latent frames of 2 x 4 tokens (for TI2V-5B's form 1 x 2).
SIZE = {**SMALL, "width": 64, "num_frames": 17, "seed": 7, "output_type": "latent"}
SPARSE = RadialAttention(0.1, block=2, dense_steps=0)


def latents(pipe, attention=SPARSE, prompt="a", **arguments):
    given = {**SIZE, "attention": attention, **arguments}
    if pipe.config.boundary_ratio is None:
        given["guidance_scale_2"] = None
    return pipe(prompt=prompt, **given).frames


def steps_of(pipe, attention, **arguments):
    """Return of each pass the expert, and whether its self-attention is sparse."""
    passes, handles = [], []
    for name in ("transformer", "transformer_2"):

        def note(model, args, kwargs, name=name):
            passes.append((name, kwargs.get("self_attention") == attention))

        handles.append(getattr(pipe, name).register_forward_pre_hook(note, with_kwargs=True))
    try:
        latents(pipe, attention, **arguments)
    finally:
        for handle in handles:
            handle.remove()
    return passes[::2]


def test_the_first_steps_of_the_schedule_are_dense(pipe):
    found = steps_of(pipe, RadialAttention(0.1, block=2), num_inference_steps=8)
    assert [sparse for _, sparse in found] == [False] * 2 + [True] * 6
    slots = [slot for slot, _ in found]
    assert slots.index("transformer_2") > 2, "an expert's first step is like any other"
    found = steps_of(pipe, RadialAttention(0.1, block=2, dense_steps=0.8), num_inference_steps=8)
    assert [sparse for _, sparse in found] == [False] * 6 + [True] * 2


def test_a_loop_written_out(pipe):
    """Euler's steps by hand, with the mask from the second step of four on."""
    given = RadialAttention(0.1, block=2, dense_steps=0.25)
    pipe.scheduler = scheduler = FlowMatchEulerScheduler(shift=5.0)
    found = latents(pipe, given, num_inference_steps=4)
    scheduler.set_timesteps(4)
    prompt, negative = pipe.encode_prompt("a")
    x = pipe.prepare_latents(1, 16, 32, 64, 17, generator=torch.Generator().manual_seed(7))
    for i, t in enumerate(scheduler.timesteps):
        slot, scale = ("transformer", 3.0) if t >= 875 else ("transformer_2", 2.0)
        options = {"return_dict": False, "self_attention": given if i >= 1 else None}
        with torch.no_grad():
            c, u = (getattr(pipe, slot)(x, t.reshape(1), e, **options)[0] for e in (prompt, negative))
        x = scheduler.step(u + scale * (c - u), t, x, return_dict=False)[0]
    torch.testing.assert_close(found, x)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_left_out_changes_no_bit(form):
    pipe = FORMS[form]()
    image = {} if form == "t2v" else {"image": torch.linspace(0, 1, 3 * 32 * 32).reshape(3, 32, 32)}
    exact = latents(pipe, None, **image)
    for attention in (
        RadialAttention(block=128),
        RadialAttention(0.1, block=2, dense_steps=1),
        RadialAttention(0.1, block=2, dense_layers=2),
    ):
        assert torch.equal(latents(pipe, attention, **image), exact)
    assert not torch.equal(latents(pipe, **image), exact)


def test_a_video_does_not_depend_on_its_neighbours(pipe):
    together = latents(pipe, prompt=["b", "a"], seed=[3, 7])
    assert torch.equal(together[1:], latents(pipe))
    assert torch.equal(together[:1], latents(pipe, prompt="b", seed=3))


@pytest.mark.parametrize("given", ["radial", {"method": "radial", "block": 2, "decay": 0.1}, SPARSE])
def test_a_recipe_holds_the_settings(pipe, given, tmp_path):
    video = pipe("a", **SIZE | {"output_type": "np"}, attention=given)
    assert video.recipe.attention["method"] == "radial"
    assert video.recipe.attention.keys() == {"method", "decay", "block", "dense_steps", "dense_layers"}
    video.save(tmp_path / "a.png")
    assert torch.equal(*(torch.from_numpy(v.frames) for v in (pipe.reproduce(video.recipe), video)))
    again = pipe.reproduce(next(tmp_path.glob("a*.png")))
    assert (again.frames == video.frames).all() and again.recipe.attention == video.recipe.attention


def test_what_it_computes_is_logged(pipe, caplog):
    with caplog.at_level(logging.INFO, "wan22"):
        latents(pipe)
        latents(pipe, "radial")
        latents(pipe, RadialAttention(dense_steps=1))
    told = [line for line in caplog.messages if "attention" in line]
    share = round(100 * SPARSE.share((5, 2, 4)))
    assert 40 < share < 100
    assert told == [
        f"radial attention computes {share} % of self-attention's blocks in 3 of 3 steps and 1 of 2 layers",
        "radial attention computes 100 % of self-attention's blocks in 2 of 3 steps and 1 of 2 layers",
        "radial attention: dense in all steps and layers, by its settings",
    ]


# ---- beside what makes pipelines faster or smaller ----


@pytest.mark.parametrize("name", ["accelerate", "attention", "streamed", *slow(["compile"])])
def test_beside_what_changes_nothing(name):
    torch._dynamo.reset()
    pipe = own("t2v")
    expected = latents(pipe)
    SAME[name][0](pipe)
    assert relative_error(latents(pipe), expected) <= 2e-5
    SAME[name][1](pipe)
    assert torch.equal(latents(pipe), expected)


@pytest.mark.parametrize("name", CHANGING)
def test_beside_what_changes_the_weights(name, tmp_path):
    pipe = own("t2v")
    plain = latents(pipe)
    CHANGING[name](pipe, save(make_lora(pipe.transformer, 1), tmp_path / "lora.safetensors"))
    dense, sparse = latents(pipe, None), latents(pipe)
    assert torch.equal(latents(pipe, RadialAttention(block=128)), dense)
    assert not torch.equal(sparse, dense) and not torch.equal(sparse, plain)


def test_compiled_blocks_are_compiled_twice():
    """Once with the layer's own kernel, once with another; not for each mask."""
    torch._dynamo.reset()
    pipe, graphs = own("t2v"), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = latents(pipe)
    pipe.compile(backend=backend)
    assert relative_error(latents(pipe), expected) <= 2e-6
    assert len(graphs) == 2
    for decay in (0.5, 2.0):
        latents(pipe, RadialAttention(decay, block=2))
    assert len(graphs) == 2


def test_while_blocks_stream_several_videos_at_once():
    pipe = own("t2v")
    expected = latents(pipe, prompt=["a", "b"])
    SAME["streamed"][0](pipe)
    for model in pipe.transformers:
        model.set_token_chunks(2)
    assert relative_error(latents(pipe, prompt=["a", "b"]), expected) <= 2e-5


def test_in_bfloat16():
    pipe = bf16_pipeline()
    assert not torch.equal(latents(pipe), latents(pipe, None))


# ---- what is refused ----


def theirs():
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": TEXT_DIM, "freq_dim": 32}
    return diffusers.WanTransformer3DModel(**config, ffn_dim=64, num_layers=2).eval()


def test_transformers_of_diffusers():
    told = "attention='radial' works within wan22's own transformer, not in diffusers' WanTransformer3DModel"
    with pytest.raises(ValueError, match=told):
        latents(random_pipeline(transformer=theirs()))


def test_processors_of_others():
    pipe = own("t2v")

    class Processor:
        def __call__(self, attn, hidden_states, *others):
            return hidden_states

    pipe.transformer_2.blocks[1].attn1.set_processor(Processor())
    with pytest.raises(
        ValueError, match="not known to the attention processor Processor; set_attn_processor"
    ):
        latents(pipe)


def test_rings(pipe, monkeypatch):
    parallel = SimpleNamespace(layout=Layout(ring=2, ulysses=2))
    monkeypatch.setattr(type(pipe), "parallel", property(lambda self: parallel))
    told = "attention='radial' needs all keys at once, and ring=2 has them pass by; share heads by ulysses="
    with pytest.raises(ValueError, match=told):
        latents(pipe)


def test_blocks_that_a_gpu_cannot_have():
    pipe = copy.deepcopy(random_pipeline())
    with FakeCard():
        pipe.to("cuda")
        with pytest.raises(ValueError, match="block=2 must be a multiple of 128 on CUDA; the nearest is 128"):
            latents(pipe)


def test_the_kernel_of_all_attention(pipe):
    with pytest.raises(ValueError, match="attention='math' is a kernel"):
        latents(pipe, "math")


def test_images_with_tokens_of_their_own():
    """Wan 2.1 I2V: cross-attention to image tokens stays as it is."""
    pipe = random_i2v_pipeline(experts=1)
    image = {"image": torch.rand(3, 32, 32)}
    exact = latents(pipe, None, **image)
    assert torch.equal(latents(pipe, RadialAttention(block=128), **image), exact)
    assert not torch.equal(latents(pipe, **image), exact)
