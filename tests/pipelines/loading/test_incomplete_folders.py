"""Folders in the Diffusers layout that were not downloaded whole: one line each, which names the file."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.builders import load_pipeline
from wan22 import AutoencoderKLWan, WanI2VPipeline, WanT2VPipeline, WanTransformer3DModel, tiny_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny_checkpoint(), tmp_path / "checkpoint")


def remove(name):
    def change(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def mark(name):
    return lambda folder: (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())


def without_a_shard(folder):
    model = WanTransformer3DModel.from_pretrained(folder / "transformer")
    (folder / "transformer" / WEIGHTS).unlink()
    model.save_pretrained(folder / "transformer", max_shard_size="50KB")
    next(iter(sorted((folder / "transformer").glob("*-00002-of-*")))).unlink()


def an_index_of_nothing(folder):
    (folder / "transformer" / WEIGHTS).rename(folder / "transformer/other.safetensors")
    write(f"transformer/{WEIGHTS}.index.json", b'{"weight_map": {"a": "x.safetensors"}}')(folder)


def an_index_of_what_is_not_in_the_shard(folder):
    path = folder / "transformer" / f"{WEIGHTS}.index.json"
    path.write_text(json.dumps({"weight_map": {"more.weight": WEIGHTS}}))


def without(weight):
    """The text encoder without a weight, which transformers would draw at random."""

    def change(folder):
        path = folder / "text_encoder/model.safetensors"
        weights = load_file(path)
        del weights[weight]
        save_file(weights, path, {"format": "pt"})

    return change


# What is wrong, and what the error of the transformer's loader and of the pipeline's must say.
TRANSFORMERS = {
    "no config.json": (remove("transformer/config.json"), r"transformer has no config\.json"),
    "an empty config.json": (write("transformer/config.json", b""), r"config\.json is empty"),
    "half of config.json": (write("transformer/config.json", b'{"a": '), r"config\.json is not JSON"),
    "a list": (write("transformer/config.json", b"[]"), r"config\.json holds a list, not a table"),
    "no weights": (
        remove(f"transformer/{WEIGHTS}"),
        r"no weights: there is no diffusion_pytorch_model\.safet",
    ),
    "no folder": (remove("transformer"), "no folder"),
    "a missing shard": (without_a_shard, r"of \d+ shards; missing: .*-00002-of-"),
    "an index of nothing": (an_index_of_nothing, r"0 of 1 shards; missing: x\.safetensors"),
    "an index that is wrong": (an_index_of_what_is_not_in_the_shard, r"more\.weight, which is not in"),
    "an index of files elsewhere": (
        write(f"transformer/{WEIGHTS}.index.json", b'{"weight_map": {"a": "../vae/x.safetensors"}}'),
        "which is no weight file beside it",
    ),
    "an index of itself": (
        write(
            f"transformer/{WEIGHTS}.index.json", f'{{"weight_map": {{"a": "{WEIGHTS}.index.json"}}}}'.encode()
        ),
        "which is no weight file beside it",
    ),
    "an index that is none": (
        write(f"transformer/{WEIGHTS}.index.json", b"{}"),
        "is no index of weight files",
    ),
}
PIPELINES = TRANSFORMERS | {
    "no second expert": (
        remove("transformer_2"),
        "no folder transformer_2, which its model_index.json lists",
    ),
    "no second expert's weights": (remove(f"transformer_2/{WEIGHTS}"), "transformer_2 has no weights"),
    "no vae": (remove("vae/config.json"), r"vae has no config\.json"),
    "no text encoder": (remove("text_encoder/model.safetensors"), r"there is no model\.safetensors"),
    "its config": (remove("text_encoder/config.json"), r"text_encoder has no config\.json"),
    "its config's mark": (
        mark("text_encoder/config.json"),
        r"config\.json begins with a byte-order mark; save",
    ),
    "its attention": (
        without("encoder.block.0.layer.0.SelfAttention.q.weight"),
        r"lacks encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight",
    ),
    "its embedding": (without("shared.weight"), r"no umT5: it has no shared\.weight|lacks .*shared\.weight"),
    "its tokens": (remove("tokenizer/tokenizer.json"), r"tokenizer has no tokenizer\.json"),
    "no tokenizer": (remove("tokenizer"), "no folder tokenizer, which its model_index.json lists"),
    "no scheduler": (remove("scheduler"), "no folder scheduler, which its model_index.json lists"),
    "its settings": (remove("scheduler/scheduler_config.json"), r"scheduler has no scheduler_config\.json"),
    "empty settings": (write("scheduler/scheduler_config.json", b""), r"scheduler_config\.json is empty"),
    "their mark": (mark("scheduler/scheduler_config.json"), "begins with a byte-order mark"),
    "empty index": (write("model_index.json", b""), r"model_index\.json is empty"),
    "half of the index": (write("model_index.json", b'{"'), r"model_index\.json is not JSON"),
    "the index's mark": (mark("model_index.json"), r"model_index\.json begins with a byte-order mark"),
    "an index without components": (write("model_index.json", b'{"a": 1}'), "names no components"),
    "another pipeline's": (
        write("model_index.json", b'{"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}'),
        "is a checkpoint for FluxPipeline; WanT2VPipeline does not run it",
    ),
}


def refused(load, message, caplog, capsys):
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises((FileNotFoundError, ValueError), match=message) as error,
    ):
        load()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert "unsafe serialization" not in caplog.text + "".join(capsys.readouterr())


@pytest.mark.parametrize("what", PIPELINES)
def test_a_pipelines_folder(folder, what, caplog, capsys):
    change, message = PIPELINES[what]
    change(folder)
    refused(lambda: WanT2VPipeline.from_pretrained(folder), message, caplog, capsys)


@pytest.mark.parametrize("what", TRANSFORMERS)
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}], ids=["ours", "diffusers'"])
def test_a_models_folder(folder, what, options, caplog, capsys):
    change, message = TRANSFORMERS[what]
    change(folder)
    load = WanTransformer3DModel.from_pretrained
    refused(lambda: load(folder, subfolder="transformer", **options), message, caplog, capsys)


def test_a_variant_that_is_not_there(folder, caplog, capsys):
    load = AutoencoderKLWan.from_pretrained
    message = (
        r"no diffusion_pytorch_model\.fp16\.safetensors; found: config\.json, diffusion_pytorch_model\.s"
    )
    refused(lambda: load(folder, subfolder="vae", variant="fp16"), message, caplog, capsys)


def test_what_is_given_need_not_be_there(folder):
    pipe = load_pipeline(folder)
    for name in ("vae", "transformer_2", "tokenizer", "scheduler"):
        remove(name)(folder)
    given = {"vae": pipe.vae, "transformer_2": None, "tokenizer": None, "scheduler": pipe.scheduler}
    assert load_pipeline(folder, **given).vae is pipe.vae


def test_a_byte_order_mark_in_what_we_read_ourselves(folder):
    mark("transformer/config.json")(folder)
    model = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    assert model.config.attention_head_dim == 64
    assert load_pipeline(folder).transformer.config.attention_head_dim == 64


def test_weights_as_pytorch_saves_them(folder, caplog, capsys):
    """Without safetensors, and read without running code that may be in them."""
    expected = load_pipeline(folder)
    for name in ("transformer", "vae"):
        torch.save(getattr(expected, name).state_dict(), folder / name / "diffusion_pytorch_model.bin")
        (folder / name / WEIGHTS).unlink()
    with caplog.at_level(logging.WARNING):
        pipe = load_pipeline(folder)
    assert "unsafe serialization" not in caplog.text + "".join(capsys.readouterr())
    for name in ("transformer", "vae"):
        weights = getattr(expected, name).state_dict()
        assert all(torch.equal(weights[k], w) for k, w in getattr(pipe, name).state_dict().items())
        assert getattr(pipe, name).dtype == getattr(expected, name).dtype


def test_the_image_pipelines_folders(tmp_path):
    folder = shutil.copytree(tiny_checkpoint("i2v"), tmp_path / "checkpoint")
    remove("transformer_2/config.json")(folder)
    with pytest.raises(FileNotFoundError, match=r"transformer_2 has no config\.json"):
        WanI2VPipeline.from_pretrained(folder)
