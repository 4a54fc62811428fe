"""Wan 2.1's CLIP image encoder from its official file."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from wan22.checkpoints.loading.encoders import load_image_processor
from wan22.checkpoints.loading.recognize import read_model

NAMES = {
    "embeddings.class_embedding": "visual.cls_embedding",
    "embeddings.position_embedding.weight": "visual.pos_embedding",
    "embeddings.patch_embedding.weight": "visual.patch_embedding.weight",
    "pre_layrnorm": "visual.pre_norm",
    "post_layernorm": "visual.post_norm",
    "encoder.layers": "visual.transformer",
    "layer_norm": "norm",
    "self_attn.out_proj": "attn.proj",
    "fc1": "0",
    "fc2": "2",
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 160, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=56, patch_size=14, hidden_act="gelu")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def official_clip(model):
    """The weights as Wan 2.1 stores them: queries, keys and values in one, the text half beside them."""
    weights = {name.removeprefix("vision_model."): w for name, w in model.state_dict().items()}
    file = {"textual.token_embedding.weight": torch.ones(3, 4), "log_scale": torch.ones(())}
    file["visual.head"] = torch.ones(model.config.hidden_size, 8)
    for name, w in weights.items():
        if ".q_proj." in name:
            fused = torch.cat([weights[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            name, w = name.replace("self_attn.q_proj", "attn.to_qkv"), fused
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if name in ("visual.cls_embedding", "visual.pos_embedding"):
            w = w.reshape(1, -1, model.config.hidden_size)
        file[name] = w.clone()
    return file


@pytest.fixture
def official(model):
    return official_clip(model)


def test_it_gives_the_tokens_of_the_model_that_was_written(model, official, tmp_path):
    torch.save(official, tmp_path / "models_clip.pth")
    loaded = read_model(tmp_path / "models_clip.pth", "image_encoder").load()
    image = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        tokens, expected = (m(image, output_hidden_states=True).hidden_states[-2] for m in (loaded, model))
    assert torch.equal(tokens, expected)
    assert loaded.config.image_size == 56
    half = read_model(tmp_path / "models_clip.pth", "image_encoder").load(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def clip_vision_h(model):
    """transformers' names, as ComfyUI's clip_vision_h.safetensors has them: with the projection's weight."""
    weights = {f"vision_model.{n.removeprefix('vision_model.')}": w for n, w in model.state_dict().items()}
    positions = torch.arange(model.config.image_size // 14 * 4 + 1)[None]
    extra = {
        "vision_model.embeddings.position_ids": positions,
        "visual_projection.weight": torch.ones(8, 160),
    }
    return weights | extra


def whole_clip(model):
    """Both halves, as CLIPModel is saved."""
    text = {"text_model.final_layer_norm.weight": torch.ones(4), "text_projection.weight": torch.ones(4, 4)}
    return clip_vision_h(model) | text | {"logit_scale": torch.ones(())}


def of_diffusers(model):
    return {n: w for n, w in clip_vision_h(model).items() if "projection" not in n and "_ids" not in n}


@pytest.mark.parametrize("form", [clip_vision_h, whole_clip, of_diffusers])
def test_transformers_names(model, form, tmp_path):
    save_file({name: w.contiguous() for name, w in form(model).items()}, tmp_path / "clip.safetensors")
    loaded = read_model(tmp_path / "clip.safetensors", "image_encoder").load()
    image = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        tokens, expected = (m(image, output_hidden_states=True).hidden_states[-2] for m in (loaded, model))
    assert torch.equal(tokens, expected)


def test_a_diffusers_repositorys_own_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = read_model(tmp_path, "image_encoder").load()
    assert loaded.config.num_attention_heads == 2
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in loaded.state_dict().items())


def test_images_are_resized_without_a_crop():
    pixels = load_image_processor()(images=torch.zeros(3, 300, 500), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("visual.transformer.1.mlp.2.weight", None, r"lacks .*encoder\.layers\.1\.mlp\.fc2\.weight"),
        ("visual.more", torch.ones(2), r"holds visual\.more, which CLIP's image encoder has no place for"),
        ("visual.pos_embedding", None, r"no CLIP image encoder: it has no embeddings\.position_embedding"),
    ],
)
def test_what_cannot_be_accounted_for_is_named(name, value, message, official, tmp_path):
    official.pop(name, None)
    if value is not None:
        official[name] = value
    torch.save(official, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path / "w.pth", "image_encoder").load()
