"""Shared work with what else makes a pipeline faster or smaller, whichever comes first: the same result."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.accel import features
from tests.accel.features import CHANGING, frames, own
from tests.accel.parallel.ranks import on_ranks
from tests.builders import bf16_pipeline
from tests.checkpoints.lora_writers import make_lora, save
from tests.golden_data import relative_error
from tests.tiers import slow
from wan22.accel.parallel import parallelize

BOUND = 2e-5
# A VAE whose rows are shared is left out by itself.
COMPILE = lambda pipe: pipe.compile(vae=pipe.parallel is not None, backend="eager")  # noqa: E731
SAME = {**features.SAME, "compile": (COMPILE, features.SAME["compile"][1])}
LAYOUTS = {"t2v": {"ulysses": 2}, "i2v": {"ring": 2}, "ti2v": {"cfg": 2}}
# What cannot be together, and what says so.
REFUSED = {
    ("int8", "fsdp"): "fsdp=True cannot divide the quantised weights of WanTransformer3DModel",
    ("streamed", "fsdp"): "fsdp=True, and a plan moves the models",
    ("fsdp", "streamed"): "each rank has only its part of the weights",
    ("fsdp", "int8"): "each rank has only its part of the weights",
    ("fsdp", "lora"): "each rank has only its part of the weights",
}


def compiled_graphs(pipe, form):
    """Make a video with compiled blocks, and return how many graphs that took."""
    counters.clear()
    torch._dynamo.reset()
    frames(pipe, form)
    return counters["stats"]["unique_graphs"]


def together(rank, form, lora):
    found = {}
    for name in (*CHANGING, *SAME):
        pipe = own(form)
        attach, take_away = SAME.get(name, (lambda pipe, name=name: CHANGING[name](pipe, lora), None))
        if name in CHANGING:
            attach(pipe)
        expected = frames(pipe, form)
        for fsdp in (False, True):
            options = LAYOUTS[form] | {"fsdp": fsdp}
            torch._dynamo.reset()
            if name in SAME:
                attach(pipe)
            if fsdp and (name, "fsdp") in REFUSED:
                with pytest.raises(ValueError, match=REFUSED[name, "fsdp"]):
                    parallelize(pipe, **options)
            else:
                parallel = parallelize(pipe, **options)
                found[name, fsdp, "before"] = relative_error(frames(pipe, form), expected)
                if name == "compile":
                    graphs = compiled_graphs(pipe, form)
                parallel.detach()
                if name == "compile":  # no more than one rank has, which are those of one expert
                    found[name, fsdp, "graphs"] = float(graphs > compiled_graphs(pipe, form))
            if name in CHANGING:
                continue
            take_away(pipe)
            parallel = parallelize(pipe, **options)
            if fsdp and ("fsdp", name) in REFUSED:
                with pytest.raises(ValueError, match=REFUSED["fsdp", name]):
                    attach(pipe)
            else:
                attach(pipe)
                found[name, fsdp, "after"] = relative_error(frames(pipe, form), expected)
                take_away(pipe)
            parallel.detach()
            found[name, fsdp, "detached"] = float(not torch.equal(frames(pipe, form), expected))
    return found


@pytest.mark.parametrize("form", ["t2v", *slow(["i2v", "ti2v"])])
def test_with_one_other(form, tmp_path):
    lora = save(make_lora(own(form).transformer, 1), tmp_path / "lora.safetensors")
    for found in on_ranks(2, together, form, lora):
        wrong = {case: value for case, value in found.items() if not value <= BOUND}
        assert not wrong
        assert len(found) == 2 * len(CHANGING) - 1 + 6 * len(SAME) - 2 + 2


def changed_while_shared(rank, lora):
    """LoRAs and quantised layers that come later are what the ranks compute with."""
    pipe, plain = own("t2v"), own("t2v")
    parallel = parallelize(pipe, ulysses=2)
    found = []
    for change in CHANGING.values():
        for each in (pipe, plain):
            change(each, lora)
        found.append(relative_error(frames(pipe, "t2v"), frames(plain, "t2v")))
    parallel.detach()
    whole = own("t2v")
    parallel = parallelize(whole, ulysses=2, fsdp=True)
    for name, change in CHANGING.items():
        with pytest.raises(ValueError, match=REFUSED["fsdp", name]):
            change(whole, lora)
    for refused in (lambda: whole.to(torch.bfloat16), lambda: whole.save_pretrained("nowhere")):
        with pytest.raises(ValueError, match="each rank has only its part"):
            refused()
    whole.free()
    return found


def test_changes_while_work_is_shared(tmp_path):
    lora = save(make_lora(own("t2v").transformer, 1), tmp_path / "lora.safetensors")
    for found in on_ranks(2, changed_while_shared, lora):
        assert max(found) <= BOUND


def in_bf16(rank):
    """Rings add up in another order, 3.5e-4; the others compute the same."""
    pipe = bf16_pipeline()
    expected = frames(pipe, "t2v")
    found = {}
    for options in (*LAYOUTS.values(), {"ulysses": 2, "fsdp": True}):
        parallel = parallelize(pipe, **options)
        found[str(options)] = relative_error(frames(pipe, "t2v"), expected)
        parallel.detach()
    return found


def test_in_bf16():
    for found in on_ranks(2, in_bf16):
        assert max(found.values()) <= 2e-3
