"""Commands are built from the pipelines' signatures, and answer without loading a library."""

import inspect
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import wan22
from wan22.cli import loading
from wan22.cli.options import FLAGS, HELP, RENAMED, CallOptions, Loading
from wan22.cli.signatures import PIPELINES, call_arguments

# What is not typed on a command line: tensors, what Python calls back, what it returns.
PYTHON_ONLY = {
    *("self", "generator", "latents", "prompt_embeds", "negative_prompt_embeds", "image_embeds"),
    *("output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
}


@pytest.mark.parametrize("task", PIPELINES)
def test_every_argument_of_a_call_is_an_option_or_for_python_only(task):
    signature = inspect.signature(getattr(wan22, PIPELINES[task]).__call__)
    options = CallOptions(task)
    names = [name for name in signature.parameters if name not in PYTHON_ONLY]
    assert [parameter.name for parameter in options.parameters] == [*names, *RENAMED]
    for parameter in options.parameters[: len(names)]:
        (info,) = parameter.annotation.__metadata__
        assert info.help and info.help[0] == info.help[0].upper()
        assert not re.search(r"\b[a-z]+_[a-z_]+\b", info.help), "Python's names are flags here"


def test_the_tables_name_arguments_that_there_are():
    known = {name for task in PIPELINES for name in call_arguments(task)}
    assert FLAGS.keys() | HELP.keys() | set(RENAMED.values()) <= known
    assert not RENAMED.keys() & known


def test_texts_become_values():
    options = CallOptions("t2v")
    values = {"sigmas": "1,0.5", "attention_kwargs": '{"scale": 2}', "seed": 3, "height": None}
    assert options.collect(**values) == {"sigmas": [1.0, 0.5], "attention_kwargs": {"scale": 2}, "seed": 3}
    for typed, scale in (("3.5", 3.5), ("4", 4.0), ("4,4,3.5", [4.0, 4.0, 3.5])):
        assert options.collect(guidance_scale=typed) == {"guidance_scale": scale}
    for typed in ("", "4,", "high"):
        with pytest.raises(
            ValueError, match=f"--guidance-scale {typed} must be a number, or one for each step"
        ):
            options.collect(guidance_scale=typed)


def answer(arguments, **environment):
    """Run the command line in a process of its own; return stdout and the heavy libraries that it loaded."""
    code = (
        "import atexit, json, sys\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'}\n"
        "atexit.register(lambda: print(json.dumps(sorted(heavy & set(sys.modules))), file=sys.stderr))\n"
        "from wan22.cli import main\n"
        "main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    return done.stdout, json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--help"], "reproduce"), (["--version"], wan22.__version__), (["models"], "Wan2.2-T2V-A14B")]
    + [([command, "--help"], "--quality") for command in ("t2v", "i2v", "batch", "reproduce")],
)
def test_what_makes_no_video_loads_no_library(arguments, word):
    out, loaded = answer(arguments)
    assert word in out and not loaded


def test_completion_of_a_flag():
    words = {"COMP_WORDS": "wan22 t2v --num-v", "COMP_CWORD": "2", "_WAN22_COMPLETE": "complete_bash"}
    out, loaded = answer([], **words)
    assert out.split() == ["--num-videos"] and not loaded


@pytest.mark.parametrize(
    ("device", "options", "dtype"),
    [
        ("cuda:0", {}, "bfloat16"),
        ("cpu", {"memory": "24GB", "model": "Wan2.2-T2V-A14B"}, "bfloat16"),
        ("cpu", {"model": "Wan2.2-T2V-A14B"}, None),
        ("cpu", {"model": "Wan2.2-T2V-A14B", "memory": "auto"}, None),
        ("cpu", {}, "float32"),
    ],
)
def test_the_dtype_that_is_not_given(device, options, dtype, monkeypatch):
    """What is planned for a GPU elsewhere is in that GPU's dtype; in half precision, the VAE is not."""
    monkeypatch.setattr(loading, "find_device", lambda name: device)
    found = loading.dtype_of(Loading(**options), None)
    half = {"default": torch.bfloat16, "vae": torch.float32}
    assert found == (half if dtype == "bfloat16" else dtype and getattr(torch, dtype))
