"""save_pretrained of our models: diffusers' files, but aligned, and whole or not there."""

import json

import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file

from tests.builders import random_transformer, random_vae
from wan22 import AutoencoderKLWan, WanTransformer3DModel
from wan22.checkpoints.files.safetensors import ALIGNMENT
from wan22.checkpoints.loading import models, saving

OPTIONS = [{}, {"variant": "fp16"}, {"max_shard_size": "50KB"}, {"variant": "fp16", "max_shard_size": "50KB"}]


@pytest.fixture
def of_diffusers(monkeypatch):
    """Save with diffusers' own code."""

    def save(model, folder, **options):
        with monkeypatch.context() as patch:
            patch.setattr(models, "save_aligned", lambda *args, **kwargs: False)
            model.save_pretrained(folder, **options)

    return save


def contents(folder):
    """Each file's contents: JSON, or tensors."""
    return {
        path.name: load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
        for path in folder.iterdir()
    }


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", [random_transformer, random_vae])
def test_the_files_are_those_of_diffusers(make, options, tmp_path, of_diffusers):
    model = make(1)
    model.save_pretrained(tmp_path / "ours", **options)
    of_diffusers(model, tmp_path / "theirs", **options)
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if not name.endswith(".safetensors"):
            assert ours[name] == expected, name
            continue
        assert ours[name].keys() == expected.keys()
        for key, tensor in expected.items():
            assert ours[name][key].dtype == tensor.dtype and torch.equal(ours[name][key], tensor)
            if tensor.nbytes % ALIGNMENT == 0:
                assert ours[name][key].data_ptr() % ALIGNMENT == 0


def test_the_earlier_shards_are_gone(tmp_path):
    model = random_transformer(1)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert torch.equal(
        WanTransformer3DModel.from_pretrained(tmp_path).scale_shift_table, model.scale_shift_table
    )


def test_a_model_is_saved_over_its_own_files(tmp_path):
    random_vae(1).save_pretrained(tmp_path)
    model = AutoencoderKLWan.from_pretrained(tmp_path)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    for found in (model, AutoencoderKLWan.from_pretrained(tmp_path)):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


def test_what_is_left_to_diffusers(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ModelMixin, "save_pretrained", _recording(asked))
    model = random_transformer(1)
    for options in ({"safe_serialization": False}, {"push_to_hub": True}, {"use_flashpack": True}):
        model.save_pretrained(tmp_path / "folder", **options)
        assert asked.pop() == options
    assert not (tmp_path / "folder").exists()
    model.save_pretrained(tmp_path / "folder", is_main_process=False)
    assert not asked
    assert [path.suffix for path in (tmp_path / "folder").iterdir()] == [".safetensors"]
    assert saving.STEM == "diffusion_pytorch_model"


def _recording(asked):
    def save_pretrained(
        self,
        save_directory,
        is_main_process=True,
        save_function=None,
        safe_serialization=True,
        variant=None,
        max_shard_size="10GB",
        push_to_hub=False,
        use_flashpack=False,
        **kwargs,
    ):
        defaults = {"safe_serialization": True, "push_to_hub": False, "use_flashpack": False}
        given = {
            "safe_serialization": safe_serialization,
            "push_to_hub": push_to_hub,
            "use_flashpack": use_flashpack,
        }
        asked.append({name: value for name, value in given.items() if value != defaults[name]})

    return save_pretrained
