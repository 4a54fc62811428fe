"""What model_index.json and files beside it may say: classes from a table, settings in their range."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from wan22 import WanT2VPipeline, tiny_checkpoint
from wan22.pipelines.loading.index import check_classes, check_index


@pytest.fixture
def path(tmp_path):
    return Path(shutil.copy(Path(tiny_checkpoint()) / "model_index.json", tmp_path))


def edited(path, **entries):
    index = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in index.items() if value is not ...}))
    return json.loads(path.read_text())


def refused(path, message, **entries):
    index = edited(path, **entries)
    with pytest.raises(ValueError, match=message) as error:
        check_index(path)
        check_classes(path, index, WanT2VPipeline, {})
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < 600


CLASSES = {
    "code": ["os", "system"],
    "a builtin": ["builtins", "exec"],
    "a module with effects": ["antigravity", "x"],
    "a module beside": ["evil", "Evil"],
    "another model": ["diffusers", "AutoencoderKL"],
    "another library": ["torch.nn", "Linear"],
    "no class": ["diffusers", "__name__"],
    "an unknown class": ["diffusers", "Nothing"],
    "a function": ["transformers", "pipeline"],
    "one word": ["diffusers"],
    "three": ["a", "b", "c"],
    "numbers": [1, 2],
    "a text": "diffusers",
    "half": ["diffusers", None],
    "a table": {"a": 1},
    "nothing": None,
}


@pytest.mark.parametrize("component", ["vae", "transformer", "tokenizer", "scheduler", "text_encoder"])
@pytest.mark.parametrize("what", CLASSES)
def test_a_class_that_is_not_a_components_is_named(what, component, path):
    refused(path, rf"model_index\.json: {component} is .*; it must be ", **{component: CLASSES[what]})
    assert "antigravity" not in sys.modules


def test_a_given_component_may_be_of_any_class(path):
    index = edited(path, vae=["somewhere", "TheirVAE"])
    check_classes(path, index, WanT2VPipeline, {"vae": None})


@pytest.mark.parametrize("component", ["vae", "transformer", "tokenizer", "scheduler", "text_encoder"])
@pytest.mark.parametrize("entry", [[None, None], ...], ids=["null", "not listed"])
def test_a_component_that_is_needed(component, entry, path):
    refused(path, rf"lists no {component}; give {component}=, or None", **{component: entry})
    check_classes(path, edited(path, **{component: entry}), WanT2VPipeline, {component: None})


def test_an_expert_alone(path):
    index = edited(path, transformer=[None, None])
    with pytest.raises(ValueError, match="lists no transformer"):
        check_classes(path, index, WanT2VPipeline, {})
    check_classes(path, index, WanT2VPipeline, {"boundary_ratio": 1})
    check_classes(path, edited(path, boundary_ratio=1.0), WanT2VPipeline, {})


@pytest.mark.parametrize("scheduler", ["FlowMatchHeunDiscreteScheduler", "DEISMultistepScheduler"])
def test_every_scheduler_of_diffusers_and_tokenizer_of_transformers(scheduler, path):
    tokenizers = ("T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast")
    for tokenizer in tokenizers:
        entries = {"scheduler": ["diffusers", scheduler], "tokenizer": ["transformers", tokenizer]}
        index = edited(path, **entries)
        check_index(path)
        check_classes(path, index, WanT2VPipeline, {})


def test_settings_out_of_their_range(path):
    refused(path, r"boundary_ratio=5 must be a number", boundary_ratio=5)
    refused(path, "two transformers, and boundary_ratio must say", boundary_ratio=None)
    refused(path, "expand_timesteps='abc' must be true or false", boundary_ratio=0.9, expand_timesteps="abc")
    refused(path, "_class_name is None; it must be a pipeline's", expand_timesteps=False, _class_name=None)


def test_files_that_other_libraries_read_are_named(tmp_path):
    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "checkpoint")
    for content in ("[]", "{}", "{", "[" * 10**5):
        (folder / "tokenizer/tokenizer.json").write_text(content)
        with pytest.raises((ValueError, OSError), match="checkpoint") as error:
            WanT2VPipeline.from_pretrained(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
