"""Models of diffusers in our pipelines: the very objects run, with all that was done to them."""

import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import attention_backend
from PIL import Image
from transformers import UMT5EncoderModel

from tests.builders import latents_of
from tests.golden_data import relative_error
from wan22 import FlowMatchUniPCScheduler, WanI2VPipeline, WanT2VPipeline, accel
from wan22.accel.parallel.rows import RowParallel
from wan22.accel.parallel.sequence import SequenceParallel
from wan22.assets import tiny_checkpoint
from wan22.pipelines.call.noise import draw

CPU = torch.device("cpu")
TINY = tiny_checkpoint("t2v")


@pytest.fixture(autouse=True)
def own_kernel():
    """diffusers' set_attention_backend of one model chooses the kernel of all models without their own."""
    with attention_backend("native"):
        yield


def transformer_of_diffusers(slot="transformer", **options):
    return diffusers.WanTransformer3DModel.from_pretrained(TINY, subfolder=slot, **options)


def vae_of_diffusers():
    return diffusers.AutoencoderKLWan.from_pretrained(TINY, subfolder="vae")


def pipeline(**components):
    pipe = WanT2VPipeline.from_pretrained(TINY, dtype=torch.float32, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(pipe, **arguments):
    arguments = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "seed": 1} | arguments
    return torch.from_numpy(pipe("a red circle", **arguments).frames)


@pytest.fixture(scope="module")
def plain():
    """Frames of our own models, of the same weights."""
    return made(pipeline())


@pytest.mark.parametrize("name", ["t2v", "i2v", pytest.param("ti2v", marks=pytest.mark.slow)])
def test_equal_to_diffusers_own_pipeline(name, caplog):
    image = name != "t2v"
    theirs = diffusers.WanImageToVideoPipeline if image else diffusers.WanPipeline
    absent = {"image_encoder": None, "image_processor": None} if image else {}
    plain = theirs.from_pretrained(tiny_checkpoint(name), **absent)
    plain.scheduler = FlowMatchUniPCScheduler(shift=5.0)
    with caplog.at_level(logging.INFO, "wan22"):
        pipe = (WanI2VPipeline if image else WanT2VPipeline).from_pipe(plain)
    assert "transformer is WanTransformer3DModel of diffusers: it runs as it is" in caplog.text
    side = 64 if name == "ti2v" else 32
    embeds, negative = pipe.encode_prompt("a red circle", "fog")
    arguments = {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative,
        "latents": draw([torch.Generator().manual_seed(3)], pipe.latent_shape(9, side, side), "cpu"),
        "height": side,
        "width": side,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "output_type": "pt",
    }
    if image:
        pixels = np.random.RandomState(0).randint(0, 256, (side, side, 3), dtype=np.uint8)
        arguments["image"] = Image.fromarray(pixels)
    for one in (pipe, plain):
        one.set_progress_bar_config(disable=True)
    assert torch.equal(pipe(**arguments).frames, plain(**arguments).frames)


def test_the_very_objects_run(plain):
    vae, transformer = vae_of_diffusers(), transformer_of_diffusers()
    pipe = pipeline(vae=vae, transformer=transformer)
    assert pipe.vae is vae
    assert pipe.transformer is transformer
    seen = []
    transformer.register_forward_hook(lambda *_: seen.append("transformer"))
    vae.decoder.register_forward_hook(lambda *_: seen.append("decoder"))
    assert relative_error(made(pipe), plain) < 1e-4
    assert seen == ["transformer"] * seen.count("transformer") + ["decoder"] * 3
    assert pipe("a", num_inference_steps=1, output_type="latent").recipe.changes == {
        "of_diffusers": ("transformer", "vae")
    }
    later = transformer_of_diffusers()
    pipe.transformer = later
    assert pipe.transformer is later


def test_from_pipe_and_components(plain):
    theirs = diffusers.WanPipeline.from_pretrained(TINY, dtype=torch.float32)
    scheduler = FlowMatchUniPCScheduler(shift=pipeline().scheduler.config.flow_shift)
    for pipe in (
        WanT2VPipeline.from_pipe(theirs, scheduler=scheduler),
        WanT2VPipeline(**theirs.components | {"scheduler": scheduler}, boundary_ratio=0.875),
    ):
        assert all(getattr(pipe, n) is getattr(theirs, n) for n in ("vae", "transformer", "transformer_2"))
        pipe.set_progress_bar_config(disable=True)
        assert relative_error(made(pipe), plain) < 1e-4


def test_the_first_script_of_diffusers_documentation(plain):
    """Text encoder and transformer are offloaded in groups before they are handed over."""
    text_encoder = UMT5EncoderModel.from_pretrained(TINY, subfolder="text_encoder", dtype=torch.float32)
    transformer = transformer_of_diffusers()
    group = {"onload_device": CPU, "offload_device": CPU}
    apply_group_offloading(text_encoder, **group, offload_type="block_level", num_blocks_per_group=1)
    transformer.enable_group_offload(**group, offload_type="leaf_level")
    pipe = pipeline(text_encoder=text_encoder, transformer=transformer, vae=vae_of_diffusers())
    pipe.to("cpu")
    onloaded = []
    first = transformer.blocks[0].attn1.to_q
    hook = first._diffusers_hook.get_hook("group_offloading")
    onload = hook.group.onload_
    hook.group.onload_ = lambda: (onloaded.append(1), onload())
    assert relative_error(made(pipe), plain) < 1e-4
    assert onloaded


def test_a_step_cache_set_by_the_caller():
    """Also after the model was handed over."""
    transformer = transformer_of_diffusers()
    pipe = pipeline(transformer=transformer)
    calls = []
    transformer.blocks[1].attn1.register_forward_hook(lambda *_: calls.append(1))
    before = latents_of(pipe, timesteps=[1000, 950, 900])
    full = len(calls)
    transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    latents_of(pipe, timesteps=[1000, 950, 900])
    assert 0 < len(calls) - full < full
    transformer.disable_cache()
    assert torch.equal(latents_of(pipe, timesteps=[1000, 950, 900]), before)


@pytest.mark.parametrize("how", ["torch.compile", "compile", "compile_repeated_blocks", "pipe.compile"])
def test_compiled(how, plain):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    transformer = transformer_of_diffusers()
    if how == "torch.compile":
        transformer = torch.compile(transformer, backend=backend)
    elif how == "compile":
        transformer.compile(backend=backend)
    elif how == "compile_repeated_blocks":
        transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    pipe = pipeline(transformer=transformer, vae=vae_of_diffusers())
    assert pipe.transformer is transformer
    if how == "pipe.compile":
        pipe.compile(backend=backend)
    assert relative_error(made(pipe), plain) < 1e-4
    assert compiled
    assert pipe.acceleration.changes()["compiled"]
    torch._dynamo.reset()


def with_lora(model):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


def with_gguf(model):
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    plain = model.blocks[0].attn1.to_q
    packed = gguf.quants.quantize(plain.weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
    linear = GGUFLinear(plain.in_features, plain.out_features, bias=True, compute_dtype=torch.float32)
    linear.weight = GGUFParameter(torch.from_numpy(packed), quant_type=gguf.GGMLQuantizationType.Q8_0)
    linear.bias = plain.bias
    model.blocks[0].attn1.to_q = linear


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (with_lora, (1e-3, 1.0)),
        (lambda model: model.fuse_qkv_projections(), (0, 1e-4)),
        (with_gguf, (1e-5, 0.1)),
        (lambda model: model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32), (1e-4, 0.5)),
        (lambda model: model.set_attention_backend("_native_math"), (0, 1e-4)),
    ],
    ids=["lora", "fused QKV", "GGUF", "layerwise casting", "attention backend"],
)
def test_what_was_done_to_a_model_counts(change, error, plain):
    model = transformer_of_diffusers()
    torch.manual_seed(0)
    change(model)
    pipe = pipeline(transformer=model)
    assert pipe.transformer is model
    low, high = error
    assert low <= relative_error(made(pipe), plain) <= high


def test_a_bf16_model_gets_bf16_latents():
    model = transformer_of_diffusers(dtype=torch.bfloat16)
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pipe = pipeline(transformer=model, transformer_2=None)
    latents = pipe("a", timesteps=[1000, 950], height=32, width=32, num_frames=5, output_type="latent").frames
    assert latents.dtype == torch.float32
    assert {call["hidden_states"].dtype for call in seen} == {torch.bfloat16}


def test_tiling_and_slicing_of_their_vae():
    vae = vae_of_diffusers()
    pipe = pipeline(vae=vae)
    whole = made(pipe, height=64, width=64)
    vae.enable_tiling(32, 32, 16, 16)
    tiles = []
    vae.decoder.register_forward_hook(lambda *_: tiles.append(1))
    assert not torch.equal(made(pipe, height=64, width=64), whole)
    assert len(tiles) > 3
    assert pipe.acceleration.changes()["tiled"]


def test_what_else_a_pipeline_does_with_them(plain, tmp_path):
    pipe = pipeline(
        transformer=transformer_of_diffusers(),
        transformer_2=transformer_of_diffusers("transformer_2"),
        vae=vae_of_diffusers(),
    )
    shown = []
    pipe("a", num_frames=5, num_inference_steps=2, preview=shown.append)
    assert len(shown) == 2
    assert len(list(pipe.stream("a", num_frames=9, num_inference_steps=1))) == 9
    assert pipe.set_attention_backend("auto") == "native"
    assert pipe.set_attention_backend("math") == "math"
    assert pipe.acceleration.changes()["attention"] == ("math",)
    assert relative_error(made(pipe), plain) < 1e-4
    pipe.decelerate()
    assert "attention" not in pipe.acceleration.changes()
    plan = accel.plan(pipe, vram="12GB", ram="12GB")
    assert plan.strips is None
    pipe.fit(ram="12GB")
    assert relative_error(made(pipe), plain) < 1e-4
    pipe.release()
    pipe.quantize("int8")
    assert 0 < relative_error(made(pipe), plain) < 0.3
    pipe.save_pretrained(tmp_path)
    assert type(diffusers.WanPipeline.from_pretrained(tmp_path).vae) is diffusers.AutoencoderKLWan
    pipe.free()


def test_what_only_ours_do_is_refused_by_name():
    vae, transformer = vae_of_diffusers(), transformer_of_diffusers()
    pipe = pipeline(vae=vae, transformer=transformer)
    with pytest.raises(TypeError, match=r"KLWan of diffusers; load it with wan22\.AutoencoderKLWan"):
        pipe.accelerate()
    with pytest.raises(ValueError, match="vae is not wan22's, whose chunks alone are compiled"):
        pipe.compile(vae=True)
    with pytest.raises(ValueError, match=r"not wan22's cannot be shared; load it with.*vae=False"):
        RowParallel(vae, None)
    with pytest.raises(ValueError, match=r"not wan22's cannot be shared; load it with.*cfg=2"):
        SequenceParallel([transformer], None)
    with pytest.raises(ValueError, match="'xformers' of diffusers is not among wan22's; the nearest is 'eff"):
        pipe.set_attention_backend("xformers")
