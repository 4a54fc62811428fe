"""Transformer, VAE, text encoder and tokenizer in one file, as ComfyUI saves a checkpoint."""

import io
import json

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from tests.builders import golden_vae, random_text_encoder
from tests.checkpoints import writers
from tests.checkpoints.loading.test_image_encoder import clip_vision_h
from tests.checkpoints.loading.test_image_encoder import model as clip  # noqa: F401
from tests.golden_data import golden
from tests.pipelines.loading.repositories import error_to_golden, golden_latents, quiet
from wan22 import AutoencoderKLWan, WanI2VPipeline, WanT2VPipeline, WanTransformer3DModel
from wan22.checkpoints import convert
from wan22.checkpoints.loading.recognize import kinds_in, read_model
from wan22.checkpoints.quantized_linear import QuantizedLinear
from wan22.cli.info import checkpoint

DIFFUSION, TEXT = "model.diffusion_model.", "text_encoders.umt5xxl."


@pytest.fixture(scope="module")
def tokenizer_model():
    """A small tokenizer of sentencepiece, with the special tokens of umT5's."""
    model, text = io.BytesIO(), iter(["a red circle moves", "to the right on a blue background"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text,
        model_writer=model,
        vocab_size=26,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def text_weights(tokenizer_model):
    """transformers' names, and what ComfyUI's class of text encoders has beside them."""
    table = {
        f"{TEXT}transformer.{name}": w.clone()
        for name, w in random_text_encoder(0).state_dict().items()
        if name != "encoder.embed_tokens.weight"
    }
    table[f"{TEXT}logit_scale"] = torch.tensor(4.6055)
    table[f"{TEXT}spiece_model"] = torch.tensor(list(tokenizer_model), dtype=torch.uint8)
    return table


def prefixed(prefix, weights):
    return {prefix + name: w.contiguous().clone() for name, w in weights.items()}


@pytest.fixture(scope="module")
def parts(tokenizer_model):
    return {
        "high": prefixed(DIFFUSION, golden("expert_t2v_high").weights),
        "low": prefixed(DIFFUSION, golden("expert_t2v_low").weights),
        "vae": prefixed("vae.", golden("vae21").weights),
        "old vae": prefixed("first_stage_model.", golden("vae21").weights),
        "text": text_weights(tokenizer_model),
    }


def write(path, *tables, metadata=None):
    save_file({name: w for table in tables for name, w in table.items()}, path, metadata)
    return path


OPTIONS = {"attention_head_dim": 24, "dtype": torch.float32}


@pytest.mark.parametrize("vae", ["vae", "old vae"])
def test_a_pipeline_from_one_file(parts, vae, tmp_path):
    file = write(tmp_path / "all.safetensors", parts["high"], parts[vae], parts["text"])
    low = write(tmp_path / "low.safetensors", parts["low"], parts[vae], parts["text"])
    assert sorted(kinds_in(file)) == ["text_encoder", "transformer", "vae"]
    pipe = WanT2VPipeline.from_single_file(file, low, **OPTIONS)
    assert error_to_golden(pipe, "pipe_t2v_unipc") <= 5e-6
    video = quiet(pipe)(
        "a red circle", width=32, height=32, num_frames=1, num_inference_steps=1, seed=0, output_type="latent"
    )
    assert video.frames.isfinite().all()
    one = WanT2VPipeline.from_single_file(str(file), **OPTIONS)
    assert one.transformer_2 is None
    assert one.vae.config.z_dim == 16


def test_the_tokenizer_is_the_one_inside(parts, tokenizer_model, tmp_path):
    file = write(tmp_path / "all.safetensors", parts["high"], parts["vae"], parts["text"])
    tokenizer = WanT2VPipeline.from_single_file(file, **OPTIONS).tokenizer
    reference = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    for text in ("a red circle", "to the right"):
        assert tokenizer(text).input_ids == [*reference.encode(text), reference.eos_id()]


def test_what_is_given_comes_first(parts, tmp_path):
    file = write(tmp_path / "all.safetensors", parts["high"], parts["vae"], parts["text"])
    pipe = WanT2VPipeline.from_single_file(file, vae=golden_vae("vae21"), text_encoder=None, **OPTIONS)
    assert pipe.vae is golden_vae("vae21")
    other = write(tmp_path / "vae.safetensors", {n: w + 1 for n, w in parts["vae"].items()})
    pipe = WanT2VPipeline.from_single_file(file, vae=other, **OPTIONS)
    assert not torch.equal(pipe.vae.encoder.conv_in.weight, golden_vae("vae21").encoder.conv_in.weight)


def test_a_model_takes_its_own_part(parts, tmp_path):
    file = write(tmp_path / "all.safetensors", parts["high"], parts["vae"], parts["text"])
    transformer = WanTransformer3DModel.from_single_file(file, attention_head_dim=24)
    weight = golden("expert_t2v_high").weights["blocks.0.ffn.0.weight"]
    assert torch.equal(transformer.blocks[0].ffn.net[0].proj.weight, weight)
    vae = AutoencoderKLWan.from_single_file(file)
    assert torch.equal(vae.encoder.conv_in.weight, golden_vae("vae21").encoder.conv_in.weight)
    encoder, ids = read_model(file, "text_encoder").load(), torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(encoder(ids).last_hidden_state, random_text_encoder(0)(ids).last_hidden_state)


@pytest.mark.parametrize("notes", ["marker", "header"])
def test_a_scaled_part(parts, notes, tmp_path):
    """ComfyUI's marks for one model stand beside the weights of others."""
    plain = {name.removeprefix(DIFFUSION): w for name, w in parts["high"].items()}
    name, metadata = tmp_path / "part.safetensors", None
    if notes == "marker":
        values = writers.comfy_old(plain, name, DIFFUSION)
        part = load_file(name)
    else:
        values = writers.comfy_new(plain, name, notes="header", prefix=DIFFUSION)
        part = load_file(name)
        layers = {
            n.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for n in part if "weight_sc" in n
        }
        layer, text = f"{TEXT}transformer.encoder.block.0.layer.0.SelfAttention.q", dict(parts["text"])
        text[f"{layer}.weight"] = text[f"{layer}.weight"].to(torch.float8_e4m3fn)
        text[f"{layer}.weight_scale"] = torch.ones(())
        layers[layer] = {"format": "float8_e4m3fn"}
        metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
        parts = parts | {"text": text}
    file = write(tmp_path / "all.safetensors", part, parts["vae"], parts["text"], metadata=metadata)
    pipe = WanT2VPipeline.from_single_file(file, **OPTIONS)
    layer = pipe.transformer.blocks[0].ffn.net[2]
    assert isinstance(layer, QuantizedLinear)
    torch.testing.assert_close(layer.weight, values["blocks.0.ffn.2.weight"], rtol=1e-6, atol=0)
    assert (
        golden_latents(WanT2VPipeline.from_single_file(file, file, **OPTIONS), "pipe_t2v_unipc") is not None
    )


def test_an_image_encoder_inside(clip, parts, tmp_path):  # noqa: F811
    transformer = prefixed(DIFFUSION, golden("dit_i2v_hd32").weights)
    vision = {name: w.contiguous() for name, w in clip_vision_h(clip).items()}
    file = write(tmp_path / "all.safetensors", transformer, parts["vae"], vision)
    assert "image_encoder" in kinds_in(file)
    encoder = read_model(file, "image_encoder").load()
    assert torch.equal(
        encoder.state_dict()[next(iter(clip.state_dict()))], next(iter(clip.state_dict().values()))
    )
    pipe = WanI2VPipeline.from_single_file(
        file, file, attention_head_dim=32, dtype=torch.float32, image_encoder=None
    )
    assert pipe.transformer.config.in_channels == 36


def test_what_belongs_to_no_model_is_named(parts, tmp_path):
    extra = {"model_ema.decay": torch.ones(1)}
    file = write(tmp_path / "all.safetensors", parts["high"], parts["vae"], extra)
    with pytest.raises(ValueError, match=r"holds model_ema\.decay, which belongs to no known model"):
        WanTransformer3DModel.from_single_file(file, attention_head_dim=24)
    file = write(tmp_path / "two.safetensors", parts["vae"], parts["text"])
    with pytest.raises(ValueError, match="holds vae and text_encoder, but no transformer"):
        WanTransformer3DModel.from_single_file(file)
    with pytest.raises(ValueError, match="holds several models: vae, text_encoder"):
        read_model(file)


def test_without_a_tokenizer_inside(parts, tmp_path):
    text = {name: w for name, w in parts["text"].items() if "spiece" not in name}
    file = write(tmp_path / "all.safetensors", parts["high"], parts["vae"], text)
    pipe = WanT2VPipeline.from_single_file(file, **OPTIONS)
    assert pipe.tokenizer is None
    with pytest.raises(ValueError, match=r"pipe\.tokenizer is None; load it"):
        pipe("a red circle", width=32, height=32, num_frames=1, num_inference_steps=1)
    with pytest.raises(ValueError, match="holds no tokenizer; give its folder"):
        WanT2VPipeline.from_single_file(file, tokenizer=file, **OPTIONS)


def test_a_table_in_place_of_a_component_is_refused(parts):
    with pytest.raises(TypeError, match="transformer is a table of tensors; give the model"):
        WanT2VPipeline.from_single_file(parts["high"], vae=golden_vae("vae21"))


def test_its_models_can_be_told_apart_and_converted(parts, tmp_path):
    transformer = prefixed(DIFFUSION, golden("dit_t2v_hd128").weights)
    file = write(tmp_path / "all.safetensors", transformer, parts["vae"], parts["text"])
    found = checkpoint(file)
    assert set(found["models"]) == {"transformer", "vae", "text_encoder"}
    assert (found["layout"], found["experts"]) == ("several models in one file", "one of one or two")
    assert found["loads with"] == f'WanT2VPipeline.from_single_file("{file}")'
    convert(file, tmp_path / "out", "single-file")
    written = load_file(tmp_path / "out/vae.safetensors")
    assert all(torch.equal(written[name], w) for name, w in golden("vae21").weights.items())
