"""Two of the things that make a pipeline faster or smaller at once: the same result, and back to the bit."""

import copy
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from tests.accel.offload.recording import RecordingDevice
from tests.builders import SMALL, random_i2v_pipeline, random_pipeline, random_ti2v_pipeline
from tests.golden_data import relative_error
from tests.pipelines.test_lora import make_lora, save
from wan22 import accel
from wan22.accel import cpu
from wan22.accel.offload.layout import Placement

MODELS = ("text_encoder", "transformer", "transformer_2", "vae")
FORMS = {"t2v": random_pipeline, "i2v": random_i2v_pipeline, "ti2v": random_ti2v_pipeline}


def streamed(pipe):
    """Let the transformers' blocks stream, and the rest come and go."""
    plan = accel.plan(pipe, height=32, width=32, num_frames=5, vram="2GB", ram="8GB")
    placements = dict.fromkeys(plan.placements, Placement("on_demand"))
    for slot in ("transformer", "transformer_2"):
        if slot in placements:
            placements[slot] = Placement("streamed", resident_blocks=1, source="pinned")
    pipe.apply(replace(plan, placements=placements), RecordingDevice())


# What changes the result comes first in each pair, as both are there in what the pair is compared with.
CHANGING = {
    "int8": lambda pipe, lora: pipe.quantize("int8"),
    "lora": lambda pipe, lora: pipe.load_lora_weights(lora),
}
SAME = {
    "accelerate": (lambda pipe: pipe.accelerate(), lambda pipe: pipe.decelerate()),
    "attention": (lambda pipe: pipe.set_attention_backend("math"), lambda pipe: pipe.set_attention_backend()),
    "compile": (lambda pipe: pipe.compile(backend="eager"), lambda pipe: pipe.uncompile()),
    "streamed": (streamed, lambda pipe: pipe.release()),
    "strips": (lambda pipe: pipe.vae.enable_strips(2), lambda pipe: pipe.vae.disable_strips()),
}
PAIRS = [pair for pair in combinations([*CHANGING, *SAME], 2) if not set(pair) <= set(CHANGING)]


def own(form):
    pipe = FORMS[form]()
    parts = {name: copy.deepcopy(getattr(pipe, name)) for name in MODELS if getattr(pipe, name) is not None}
    for slot in ("transformer", "transformer_2"):
        if slot in parts:  # enough blocks that some stream
            parts[slot].blocks.extend(copy.deepcopy(parts[slot].blocks[0]) for _ in range(3))
    return FORMS[form](**parts)


def frames(pipe, form):
    arguments = {**SMALL, "height": 32, "width": 32, "num_frames": 9, "seed": 1, "output_type": "pt"}
    if pipe.config.boundary_ratio is None:
        arguments.pop("guidance_scale_2", None)
    if form != "t2v":
        arguments["image"] = torch.linspace(0, 1, 3 * 32 * 32).reshape(3, 32, 32)
    return pipe(prompt="a", **arguments).frames


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    """Let oneDNN compute the small layers of these models as well."""
    monkeypatch.setattr(cpu, "_LARGE", 0)


def check(form, pair, tmp_path):
    torch._dynamo.reset()
    pipe = own(form)
    lora = save(make_lora(pipe.transformer, 1), tmp_path / "lora.safetensors")
    for name in pair:
        if name in CHANGING:
            CHANGING[name](pipe, lora)
    expected = frames(pipe, form)
    same = [name for name in pair if name in SAME]
    for name in same:
        SAME[name][0](pipe)
    assert relative_error(frames(pipe, form), expected) <= 2e-5
    for name in reversed(same):
        SAME[name][1](pipe)
    assert torch.equal(frames(pipe, form), expected)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pairs(pair, tmp_path):
    check("t2v", pair, tmp_path)


@pytest.mark.parametrize("form", ["i2v", "ti2v"])
@pytest.mark.parametrize("name", SAME)
def test_with_a_lora_in_the_other_forms(name, form, tmp_path):
    check(form, ("lora", name), tmp_path)


def test_changes_while_weights_stream(tmp_path):
    """LoRAs and quantised layers that come while a plan is applied are what comes to the device next."""
    pipe, plain = own("t2v"), own("t2v")
    lora = save(make_lora(pipe.transformer, 1), tmp_path / "lora.safetensors")
    streamed(pipe)
    frames(pipe, "t2v")
    for change in CHANGING.values():
        for each in (pipe, plain):
            change(each, lora)
        assert torch.equal(frames(pipe, "t2v"), frames(plain, "t2v"))
