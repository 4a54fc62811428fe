"""What a configuration may say: each entry's kind and range, told in one line before anything is built."""

import json
import math
import time

import pytest

from wan22 import AutoencoderKLWan, WanTransformer3DModel
from wan22.checkpoints.naming.schemas import INDEX, SCHEDULER, check_config, read_config

TRANSFORMER, AUTOENCODER = {"_class_name": "WanTransformer3DModel"}, {"_class_name": "AutoencoderKLWan"}
OFFICIAL, UMT5 = {"_class_name": "WanModel", "dim": 256, "num_heads": 2}, {"model_type": "umt5"}
CLIP = {"model_type": "clip_vision_model"}
NAN = math.nan
WRONG = [
    (TRANSFORMER, "num_layers", [10**9, 0, -1, 1.5, True, "40", None, [1], NAN]),
    (TRANSFORMER, "num_attention_heads", [10**9, 0, "2"]),
    (TRANSFORMER, "attention_head_dim", [10**18, 5, 4, 127]),
    (TRANSFORMER, "freq_dim", [-1, 255]),
    (TRANSFORMER, "in_channels", [None, math.inf]),
    (TRANSFORMER, "eps", [1e9, -1e-6, NAN, "1e-6", None, True]),
    (TRANSFORMER, "patch_size", [2, None, "abc", [1, 2], [0, 2, 2], [1, 2, "2"], [1, 2, 2, 2]]),
    (TRANSFORMER, "rope_max_seq_len", [0, None, NAN]),
    (TRANSFORMER, "qk_norm", [None, "layer_norm", ["rms_norm_across_heads"]]),
    (TRANSFORMER, "cross_attn_norm", [1, "true"]),
    (TRANSFORMER, "pos_embed_seq_len", [514]),  # without image_dim
    (AUTOENCODER, "num_res_blocks", [10**9, 0]),
    (AUTOENCODER, "dim_mult", [[], "abc", [0, 1], [1.5], [1] * 10**6, None]),
    (AUTOENCODER, "latents_mean", [[], "abc", None, 5, [NAN], [1e30], [[0.0]], ["a"]]),
    (AUTOENCODER, "latents_std", [[0.0], [-1.0], [1e-30], [math.inf]]),
    (AUTOENCODER | {"z_dim": 16}, "latents_mean", [[0.5], [0.0] * 17]),
    (AUTOENCODER | {"dim_mult": [1, 2]}, "temperal_downsample", [[True, True], ["x"], None]),
    (AUTOENCODER | {"patch_size": 2}, "in_channels", [3, 13]),
    (OFFICIAL, "dim", [0, 10**9, "256"]),
    (OFFICIAL, "num_heads", [0, 3, 64, 85.5]),
    (UMT5, "num_layers", [10**9]),
    (UMT5, "feed_forward_proj", ["relu", None]),
    (UMT5, "relative_attention_max_distance", [0, -1]),
    (UMT5, "dtype", ["__import__('os')", 5]),
    (UMT5, "quantization_config", ["abc", {"quant_method": "abc"}, {}]),
    (CLIP, "num_hidden_layers", [10**9]),
    (CLIP, "layer_norm_eps", [NAN]),
]


def refused(config, name, schema=None):
    with pytest.raises(ValueError, match=f"^config: .*{name}") as error:
        check_config("config", config, schema)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(("config", "name", "values"), WRONG, ids=[f"{n}-{c}" for c, n, _ in WRONG])
def test_a_value_out_of_its_range_is_named(config, name, values):
    for value in values:
        refused(config | {name: value}, name)


@pytest.mark.parametrize(
    ("schema", "name", "values"),
    [
        (INDEX, "boundary_ratio", [5, -1, NAN, "abc", True, [0.5]]),
        (INDEX, "expand_timesteps", ["abc", 5, None]),
        (SCHEDULER, "flow_shift", [0, -1, None, "abc", math.inf]),
        (SCHEDULER, "solver_order", [0, 10**9, "2"]),
        (SCHEDULER, "num_train_timesteps", [0, 10**9]),
        (SCHEDULER, "solver_type", ["abc", None]),
        (SCHEDULER, "use_dynamic_shifting", [True, "no"]),
        (SCHEDULER, "_class_name", [None, ["os", "system"]]),
    ],
)
def test_settings_of_a_pipeline_and_of_a_scheduler(schema, name, values):
    for value in values:
        refused({name: value}, name, schema)


@pytest.mark.parametrize("cls", [WanTransformer3DModel, AutoencoderKLWan])
def test_what_the_models_write_is_accepted(cls, tmp_path):
    sizes = {"num_layers": 1} if cls is WanTransformer3DModel else {"base_dim": 4, "num_res_blocks": 1}
    cls(**sizes).save_config(tmp_path)
    assert read_config(tmp_path / "config.json")["_class_name"] == cls.__name__


def test_a_file_is_refused_before_anything_is_built(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TRANSFORMER | {"num_layers": 10**9}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    started = time.monotonic()
    with pytest.raises(
        ValueError, match=r"config\.json: num_layers=1000000000 must be an int, 1 to 256; the"
    ):
        WanTransformer3DModel.from_pretrained(tmp_path)
    assert time.monotonic() - started < 1


def test_an_empty_file_and_a_missing_one(tmp_path):
    assert read_config(tmp_path / "config.json") == {}
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is an empty table"):
        read_config(tmp_path / "config.json")


def test_what_no_shape_tells_must_be_in_an_official_file(tmp_path):
    """A head of another size gives another video from the same weights."""
    from safetensors.torch import save_file

    from wan22.checkpoints.naming.keys import TRANSFORMER as KEYS

    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 32, "num_layers": 1}
    model = WanTransformer3DModel(**sizes, text_dim=32, freq_dim=32)
    weights = {KEYS.inverse.rename(name): w for name, w in model.state_dict().items()}
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    official = {"_class_name": "WanModel", "dim": 48, "num_heads": 2, "eps": 1e-6}
    for missing in ("dim", "num_heads", "eps"):
        given = {name: value for name, value in official.items() if name != missing}
        (tmp_path / "config.json").write_text(json.dumps(given))
        with pytest.raises(ValueError, match=f"config.json beside it has no entry {missing}"):
            WanTransformer3DModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(official))
    assert WanTransformer3DModel.from_pretrained(tmp_path).config.attention_head_dim == 24
