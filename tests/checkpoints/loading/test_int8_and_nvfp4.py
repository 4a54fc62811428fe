"""Files in int8 and NVFP4, of LightX2V, ComfyUI and TurboDiffusion; what cannot be told is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import writers
from tests.checkpoints.loading.test_models import official, plain, run  # noqa: F401
from tests.checkpoints.loading.test_recognize import check
from wan22 import WanTransformer3DModel
from wan22.accel.quantization.layers import formats_of
from wan22.checkpoints.quantized_linear import QuantizedLinear

FORMS = {
    "int8 of LightX2V": (writers.int8, "int8"),
    "int8 of ComfyUI": (lambda w, path: writers.int8(w, path, False, True), "int8, one scale"),
    "int8 of ComfyUI, per output": (lambda w, path: writers.int8(w, path, True, True), "int8"),
    "int8 of TurboDiffusion": (writers.turbodiffusion, "int8, tiles of 128"),
    **{
        f"NVFP4 of {program}": (lambda w, path, program=program: writers.nvfp4(w, path, program), "nvfp4")
        for program in ("comfy", "lightx2v", "lightx2v, calibrated")
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_the_values_are_those_of_the_file(official, form, tmp_path):  # noqa: F811
    write, name = FORMS[form]
    values = write(official, tmp_path / "w")
    expected = plain(values)
    expanded = WanTransformer3DModel.from_single_file(tmp_path / "w", dtype=torch.float32, dequantize=True)
    found = expanded.state_dict()
    for own, w in expected.state_dict().items():
        torch.testing.assert_close(found[own], w, rtol=1e-6, atol=1e-9)
    kept = WanTransformer3DModel.from_single_file(tmp_path / "w", dtype=torch.float32)
    assert formats_of(kept) == {name: 20}
    assert all(isinstance(kept.get_submodule(f"blocks.1.attn1.to_{n}"), QuantizedLinear) for n in "qkv")
    torch.testing.assert_close(run(kept), run(expected), rtol=1e-5, atol=1e-5)
    stored = sum(t.nbytes for t in (*kept.parameters(), *kept.buffers()))
    assert stored <= 1.05 * (tmp_path / "w").stat().st_size
    parts = {n: p.clone() for n, p in kept.named_parameters() if n.endswith((".data", ".scale", ".factor"))}
    kept.to(torch.bfloat16)
    assert all(torch.equal(dict(kept.named_parameters())[n], p) for n, p in parts.items()), "not rounded"
    check(tmp_path / "w", "transformer")


def test_saved_they_are_ordinary_models(official, tmp_path):  # noqa: F811
    values = writers.nvfp4(official, tmp_path / "w", "comfy")
    model = WanTransformer3DModel.from_single_file(tmp_path / "w", dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(run(again), run(plain(values)), rtol=1e-5, atol=1e-5)


LAYER = "blocks.0.ffn.0"


def note(**settings):
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


HOSTILE = {
    "comfy": [
        ({".comfy_quant": None}, r"quantised as nvfp4 \(blocks.0.ffn.0.weight_scale_2\), but not as"),
        ({".weight_scale_2": None}, r"quantised as nvfp4 \(blocks.0.ffn.0\), but not as ComfyUI"),
        (
            {".weight_scale": None},
            "quantised as nvfp4, but its weight or its scale is missing",
        ),
        ({".weight_scale": torch.ones(512, 16)}, r"blocks.0.ffn.0.weight: its scales are torch.float32"),
        ({".weight": torch.zeros(512, 96, dtype=torch.uint8)}, "blocks.0.ffn.0.weight: its scales are"),
        ({".weight": torch.zeros(512, 128)}, "said to be nvfp4, but is torch.float32"),
        ({".weight_scale_2": torch.tensor(float("inf"))}, "factor is zero, or not finite"),
        (
            {".weight_scale": torch.full((512, 16), float("nan")).to(writers.FP8)},
            "scales that are not finite",
        ),
        (
            {".comfy_quant": note(format="nvfp4", convrot=True)},
            "nvfp4 with convrot, which is not read",
        ),
        ({".pre_quant_scale": torch.ones(256)}, "pre_quant_scale, which this model has no place for"),
        ({".weight_global_scale": torch.ones(())}, "but not as ComfyUI or LightX2V"),
    ],
    "lightx2v": [
        ({".weight_global_scale": torch.zeros(())}, "factor is zero, or not finite"),
        ({".weight_global_scale": None}, "weight is uint8; weights of this kind are not read"),
        ({".weight_scale": None}, "its weight or its scale is missing"),
        ({".weight": None}, "its weight or its scale is missing"),
        ({".weight_scale_2": torch.ones(())}, "but not as ComfyUI or LightX2V writes it"),
        ({".weight": torch.zeros(512, 128, dtype=torch.int8)}, "int8 of shape .* holds no rows of pairs"),
    ],
    "lightx2v, calibrated": [
        ({".alpha": None}, "blocks.0.ffn.0.weight: its alpha is missing"),
        ({".alpha": torch.ones(2)}, "not one number"),
    ],
}


@pytest.mark.parametrize(
    ("program", "case"), [(p, i) for p, cases in HOSTILE.items() for i in range(len(cases))]
)
def test_four_bits_that_cannot_be_accounted_for(official, program, case, tmp_path):  # noqa: F811
    changes, message = HOSTILE[program][case]
    writers.nvfp4(official, tmp_path / "w", program)
    refused(tmp_path / "w.safetensors", load_file(tmp_path / "w"), changes, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({".weight_scale": None}, r"blocks.0.ffn.0.weight is scaled int8, but its scale is missing"),
        ({".weight_scale": torch.full((512, 1), float("nan"))}, "its scale is zero, or not finite"),
        ({".weight_scale": torch.ones(7, 1)}, r"the scale has shape \(7, 1\)"),
        ({".weight_zero_point": torch.ones(512)}, "int8 or int4 with zero points"),
        ({".comfy_quant": note(format="int8_tensorwise", convrot=True)}, "with convrot, which is not read"),
        ({".comfy_quant": note(format="convrot_w4a4")}, "quantised as convrot_w4a4; of such layers"),
        ({".bias": torch.zeros(512, dtype=torch.int8)}, "bias is int8; weights of this kind are not read"),
    ],
)
def test_int8_that_cannot_be_accounted_for(official, changes, message, tmp_path):  # noqa: F811
    writers.int8(official, tmp_path / "w")
    refused(tmp_path / "w.safetensors", load_file(tmp_path / "w"), changes, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({".scale": None}, "blocks.0.ffn.0.int8_weight is int8, but its scale is missing"),
        ({".scale": torch.ones(4, 1)}, r"blocks.0.ffn.0.weight: its scales are .*not one per tile, \(4, 2\)"),
        ({".scale": torch.full((4, 2), float("nan"))}, "not finite"),
        ({".weight": torch.ones(512, 256)}, "there are blocks.0.ffn.0.weight and blocks.0.ffn.0.int8_weight"),
        ({".int8_weight": torch.ones(512, 256)}, "no int8 matrix"),
        (
            {".self_attn.attn_op.local_attn.proj_l.weight": torch.ones(64, 64)},
            r"sparse-linear attention \(SLA, of TurboDiffusion\), which is not supported",
        ),
    ],
)
def test_tiles_that_cannot_be_accounted_for(official, changes, message, tmp_path):  # noqa: F811
    writers.turbodiffusion(official, tmp_path / "w")
    table = torch.load(tmp_path / "w", weights_only=True)
    refused(tmp_path / "w.safetensors", {n: t.contiguous() for n, t in table.items()}, changes, message)


def refused(path, table, changes, message):
    for suffix, tensor in changes.items():
        table.pop(LAYER + suffix, None)
        if tensor is not None:
            table[LAYER + suffix] = tensor
    save_file(table, path)
    with pytest.raises(ValueError, match=message) as error:
        WanTransformer3DModel.from_single_file(path)
    assert str(path) in str(error.value)
