"""How a model is quantised, in words: what two models have in common that compute the same."""

import copy
from types import SimpleNamespace

import pytest
import torch

from tests.builders import random_transformer
from wan22.accel.quantization.layers import formats_of, is_quantized, needs_quantizing
from wan22.accel.quantization.settings import Quantization
from wan22.accel.quantize import dequantize, quantize
from wan22.checkpoints.files.quantized import GgufBlocks, ScaledNumbers


def transformer():
    return copy.deepcopy(random_transformer(1))


@pytest.mark.parametrize(
    ("method", "block", "name"),
    [("fp8", None, "fp8"), ("int8", None, "int8"), ("int8", 48, "int8"), ("fp8", 24, "fp8, 2 groups")],
)
def test_the_method_and_its_groups(method, block, name):
    model = transformer()
    assert formats_of(model) == {} and needs_quantizing(model, Quantization(method))
    with_block = block is not None and block < 48
    if block is not None:
        model.blocks[0].ffn = torch.nn.Identity()  # of another width, with other numbers of groups
        model.blocks[1].ffn = torch.nn.Identity()
    found = formats_of(quantize(model, method, block))
    assert found == {name: 16 if block else 20}
    assert with_block or not needs_quantizing(model, Quantization(method))


def test_another_method_is_refused_by_name():
    model = quantize(transformer(), "fp8")
    for method, name in (("int8", "int8"), ("fp8_dynamic", "fp8_dynamic"), (object(), "object")):
        with pytest.raises(
            ValueError, match=rf"WanTransformer3DModel is quantised already \(fp8\), and {name}"
        ):
            needs_quantizing(model, Quantization(method))


def test_what_was_expanded_keeps_its_rounded_values():
    model = dequantize(quantize(transformer(), "fp8"))
    assert not is_quantized(model) and formats_of(model) == {"fp8, expanded": 20}
    assert formats_of(copy.deepcopy(model)) == formats_of(model)
    assert formats_of(quantize(model, "int8")) == {"fp8, expanded, int8": 20}


def test_formats_of_files():
    assert ScaledNumbers(torch.float8_e5m2, None).name == "fp8 e5m2, one scale"
    assert ScaledNumbers(torch.float8_e4m3fn, 1).name == "fp8"
    pytest.importorskip("gguf")
    assert GgufBlocks("Q8_0", (1, 32)).name == "Q8_0"


def test_another_librarys_settings():
    model = transformer()
    config = SimpleNamespace(to_dict=lambda: {"quant_method": "bitsandbytes", "load_in_8bit": True})
    vars(model)["hf_quantizer"] = SimpleNamespace(quantization_config=config)
    assert formats_of(model) == {"bitsandbytes": {"load_in_8bit": "True", "quant_method": "bitsandbytes"}}


def test_layers_of_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    model = quantize(transformer(), torchao.Int8WeightOnlyConfig())
    (first, count), *_ = formats_of(model).items()
    assert "int8" in first and count > 1
    assert all("expanded" in name for name in formats_of(dequantize(model)))
