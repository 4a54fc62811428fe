"""`from_single_file` with diffusers' arguments: each is followed, has no effect, or is refused by name."""

import json
import logging
import shutil

import pytest
import torch
from diffusers import BitsAndBytesConfig, GGUFQuantizationConfig
from diffusers.models.model_loading_utils import load_gguf_checkpoint
from safetensors.torch import save_file

from tests.checkpoints import writers
from tests.checkpoints.loading.test_models import assert_same, assert_same_config, official, plain  # noqa: F401
from tests.pipelines.loading.repositories import make_repository
from wan22 import WanTransformer3DModel, tiny_checkpoint
from wan22.checkpoints.files import hub
from wan22.checkpoints.quantized_linear import QuantizedLinear

load = WanTransformer3DModel.from_single_file


@pytest.fixture
def file(official, tmp_path):  # noqa: F811
    save_file(official, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize("name", ["pretrained_model_link_or_path_or_dict", "pretrained_model_link_or_path"])
def test_the_first_argument_by_name(official, file, name):  # noqa: F811
    assert_same(load(**{name: str(file)}), plain(official))
    for arguments in ({}, {"source": file, name: file}):
        with pytest.raises(TypeError, match="one file, address or table of tensors"):
            load(**arguments)


def test_a_table_of_tensors(official):  # noqa: F811
    names = set(official)
    assert_same(load(official), plain(official))
    assert_same(load({"state_dict": official}), plain(official))
    assert_same(load(plain(official).state_dict()), plain(official))
    assert set(official) == names, "the caller's table is left alone"
    with pytest.raises(ValueError, match=r"the table of tensors holds 'a', which is no tensor"):
        load({"a": 1, "b": 2})
    with pytest.raises(TypeError, match="not a int"):
        load(3)


@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
def test_a_table_that_diffusers_read_from_gguf(official, kind, tmp_path):  # noqa: F811
    flat = {name: w for name, w in official.items() if w.ndim < 5}
    writers.write_gguf(flat, tmp_path / "w.gguf", kind, every=True)
    table = load_gguf_checkpoint(tmp_path / "w.gguf", return_tensors=True)
    weight = {"patch_embedding.weight": official["patch_embedding.weight"]}
    save_file(weight, tmp_path / "patch.safetensors")
    model = load(table | weight, dtype=torch.float32)
    expected = load(
        {**weight, **{name: dequantized(tensor) for name, tensor in table.items()}}, dtype=torch.float32
    )
    assert isinstance(model.blocks[0].attn1.to_q, QuantizedLinear) is (kind == "Q8_0")
    for name in ("attn1.to_q", "ffn.net.2"):
        ours, theirs = (m.blocks[0].get_submodule(name).weight for m in (model, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def dequantized(tensor):
    import gguf

    if not hasattr(tensor, "quant_type"):
        return tensor
    return torch.from_numpy(gguf.quants.dequantize(tensor.as_tensor().numpy(), tensor.quant_type)).float()


def test_an_address(official, file, monkeypatch):  # noqa: F811
    calls = []

    def download(repository, path, **options):
        calls.append((repository, path, options))
        return str(file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    address = "https://huggingface.co/city96/Wan-gguf/blob/main/low/q8.gguf"
    assert_same(load(address, local_files_only=True, token=False), plain(official))
    assert_same(load("city96/Wan-gguf/low/q8.gguf", revision="v1"), plain(official))
    assert [call[:2] for call in calls] == [("city96/Wan-gguf", "low/q8.gguf")] * 2
    assert calls[0][2] == {"local_files_only": True, "token": False, "revision": "main"}
    assert calls[1][2] == {"revision": "v1"}


# ---- dtype and quantisation ----


def test_gguf_as_scripts_for_diffusers_load_it(official, tmp_path, caplog):  # noqa: F811
    writers.write_gguf(official, tmp_path / "w.gguf", "Q8_0")
    config = GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
    options = {"quantization_config": config, "low_cpu_mem_usage": True, "disable_mmap": False}
    model = load(tmp_path / "w.gguf", torch_dtype=torch.bfloat16, **options)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert load(tmp_path / "w.gguf", **options).blocks[0].attn1.to_q.bias.dtype == torch.bfloat16
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="wan22"):
        wide = load(tmp_path / "w.gguf", dtype="float32", quantization_config=config)
    assert wide.blocks[0].attn1.to_q.bias.dtype == torch.float32
    assert "compute_dtype=torch.bfloat16 has no effect" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
            ValueError,
            "cannot be loaded as BitsAndBytesConfig",
        ),
        ({"original_config": {}}, ValueError, "original_config is not supported: the sizes follow from"),
        ({"proxies": {"https": "x"}}, ValueError, "proxies is not supported: set .* HTTPS_PROXY"),
        ({"device_map": {"blocks": 0, "proj_out": "cpu"}}, ValueError, "goes to one device"),
        ({"device_map": "disk"}, ValueError, "goes to one device"),
        (
            {"atention_head_dim": 64},
            TypeError,
            "no argument atention_head_dim; the nearest is attention_head",
        ),
        ({"config": "/nowhere/folder"}, FileNotFoundError, "no folder config= /nowhere/folder"),
    ],
)
def test_what_would_change_the_result_is_refused(file, options, error, message):
    with pytest.raises(error, match=message):
        load(file, **options)


@pytest.mark.parametrize(
    "options", [{"device": "meta"}, {"device_map": {"": "meta"}}, {"device_map": "meta"}]
)
def test_the_device(file, options):
    assert load(file, **options).device.type == "meta"


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto"},
        {"low_cpu_mem_usage": False},
        {"disable_mmap": True},
        {"use_safetensors": True},
        {"original_config": None, "config": None, "subfolder": None, "device": None},
    ],
)
def test_what_has_no_effect(official, file, options):  # noqa: F811
    model = load(file, **options)
    assert_same(model, plain(official))
    assert model.device.type == "cpu"


# ---- a configuration beside the file ----


@pytest.fixture
def tiny():
    return tiny_checkpoint() / "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "options",
    [
        {"config": str(tiny_checkpoint()), "subfolder": "transformer"},
        {"config": tiny_checkpoint()},
        {"config": tiny_checkpoint() / "transformer"},
        {"config": tiny_checkpoint() / "transformer/config.json"},
        {"config": json.loads((tiny_checkpoint() / "transformer/config.json").read_text())},
    ],
)
def test_what_the_tensors_do_not_say_is_the_configurations(tiny, options):
    """The size of a head, which is 64 here and would be taken to be 128."""
    model = load(tiny, **options)
    assert model.config.attention_head_dim == 64
    expected = WanTransformer3DModel.from_pretrained(tiny_checkpoint(), subfolder="transformer")
    assert_same_config(model, expected)


def changed(tmp_path, **entries):
    folder = shutil.copytree(tiny_checkpoint() / "transformer", tmp_path / "transformer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    return tmp_path


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"in_channels": 36}, "says in_channels=36, but the tensors of .* say 16"),
        ({"num_layers": 40}, "says num_layers=40, but the tensors"),
        ({"attention_head_dim": 32}, "says num_attention_heads=2, but the tensors of .* say 4"),
        ({"_class_name": "WanVACETransformer3DModel"}, "the configuration of a WanVACETransformer3DModel"),
    ],
)
def test_a_configuration_of_another_model_is_refused(tiny, entry, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(tiny, config=changed(tmp_path, **entry))


def test_a_repository_for_the_configuration(tiny, tmp_path):
    options = {"config": "org/name", "subfolder": "transformer", "cache_dir": tmp_path / "cache"}
    assert load(tiny, attention_head_dim=64, **options).config.attention_head_dim == 64, "it is not here"
    make_repository(tmp_path / "cache", "org/name", {"main": changed(tmp_path / "made", eps=1e-5)})
    model = load(tiny, **options)
    assert (model.config.attention_head_dim, model.config.eps) == (64, 1e-5)
    assert load(tiny, eps=1e-3, **options).config.eps == 1e-3, "the caller comes first"
