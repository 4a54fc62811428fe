"""NVFP4 and int8 in tiles: every number, sizes that fill no tile, some rows, and parts that do not fit."""

import pytest
import torch

from tests.checkpoints import writers
from wan22.checkpoints.files.nvfp4 import float4_numbers, has_finite_scales, nvfp4
from wan22.checkpoints.files.quantized import expanded, on_meta, scaled_tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.05


def four_bits(rows, columns, high_first=True):
    *parts, values = writers.pairs_of(weight(rows, columns), high_first)
    return nvfp4(*parts, high_first=high_first), values


def eight_bits(rows, columns):
    scale, codes, values = writers.tiles_of(weight(rows, columns))
    return scaled_tiles(codes, scale), values


def test_all_sixteen_numbers():
    found = float4_numbers(torch.arange(16, dtype=torch.uint8))
    assert torch.equal(found, writers.E2M1) and found.signbit().sum() == 8


@pytest.mark.parametrize("shape", [(5, 48), (128, 64), (200, 16), (1100, 80)])
@pytest.mark.parametrize("high_first", [True, False])
def test_four_bits(shape, high_first):
    tensor, values = four_bits(*shape, high_first)
    assert tensor.shape == shape and tensor.format.name == "nvfp4"
    for dtype in DTYPES:
        assert torch.equal(tensor.format.expand(tensor.parts, dtype), values.to(dtype))
    assert torch.equal(expanded(tensor), values)
    chosen = torch.tensor([shape[0] - 1, 0, 3])
    assert torch.equal(expanded(tensor.rows(chosen)), values[chosen])
    assert expanded(on_meta(tensor)).shape == shape
    error = (values - weight(*shape)).norm() / weight(*shape).norm()
    assert 0.05 < error < 0.15
    other = nvfp4(
        *(tensor.parts[n] for n in ("data",)),
        tensor.parts["scale"].view(writers.FP8),
        tensor.parts["factor"],
        high_first=not high_first,
    )
    assert not torch.equal(expanded(other), values), "the order within a pair counts"


@pytest.mark.parametrize("shape", [(5, 48), (128, 256), (200, 130), (1100, 300)])
def test_eight_bits_in_tiles(shape):
    tensor, values = eight_bits(*shape)
    assert tensor.shape == shape and tensor.format.name == "int8, tiles of 128"
    for dtype in DTYPES:
        assert torch.equal(tensor.format.expand(tensor.parts, dtype), values.to(dtype))
    chosen = torch.tensor([shape[0] - 1, 0, 3])
    assert torch.equal(expanded(tensor.rows(chosen)), values[chosen])


@pytest.mark.parametrize("make", [four_bits, eight_bits])
def test_compiled_they_are_the_same(make):
    """The whole is computed at once then."""
    tensor, values = make(200, 144)
    function = torch.compile(lambda parts: tensor.format.expand(parts, torch.bfloat16), backend="eager")
    assert torch.equal(function(dict(tensor.parts)), values.bfloat16())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("make", [four_bits, eight_bits])
def test_a_gpu_expands_to_the_same_bits(make):
    tensor, values = make(1100, 304)
    parts = {name: part.cuda() for name, part in tensor.parts.items()}
    assert all(torch.equal(tensor.format.expand(parts, d).cpu(), values.to(d)) for d in DTYPES)


def test_scales_that_are_no_numbers():
    tensor, _ = four_bits(5, 48)
    assert has_finite_scales(tensor)
    for wrong in (0x7F, 0xFF):
        tensor.parts["scale"][3, 1] = wrong
        assert not has_finite_scales(tensor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": torch.zeros(5, 23, dtype=torch.uint8)}, r"uint8 of shape \(5, 23\) holds no rows of pairs"),
        ({"data": torch.zeros(5, 24)}, r"float32 of shape \(5, 24\) holds no rows of pairs"),
        ({"data": torch.zeros(0, 24, dtype=torch.uint8)}, "holds no rows of pairs"),
        ({"data": torch.zeros(120, dtype=torch.uint8)}, "holds no rows of pairs"),
        ({"scale": torch.zeros(5, 3).to(writers.FP8)}, r"scales are torch.float8_e4m3fn of shape \(5, 3\)"),
        (
            {"scale": torch.zeros(128, 4)},
            "float32 of shape .*, not float8_e4m3fn of shape",
        ),
        ({"factor": torch.ones(2)}, "not one number"),
        ({"factor": torch.ones((), dtype=torch.int32)}, "not one number"),
        ({"factor": torch.zeros(1)}, "factor is zero, or not finite"),
        ({"factor": torch.tensor(float("nan"))}, "factor is zero, or not finite"),
    ],
)
def test_parts_of_four_bits_that_do_not_fit(changes, message):
    data, scale, factor, _ = writers.pairs_of(weight(5, 48), True)
    with pytest.raises(ValueError, match=message):
        nvfp4(**{"data": data, "scale": scale, "factor": factor, **changes}, high_first=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": torch.zeros(200, 130)}, "no int8 matrix"),
        ({"data": torch.zeros(200, dtype=torch.int8)}, "no int8 matrix"),
        ({"scale": torch.ones(2, 1)}, r"float32 of shape \(2, 1\), not one per tile, \(2, 2\)"),
        ({"scale": torch.ones(2, 2, dtype=torch.int32)}, "not one per tile"),
        ({"scale": torch.full((2, 2), torch.inf)}, "not finite"),
    ],
)
def test_parts_of_tiles_that_do_not_fit(changes, message):
    scale, codes, _ = writers.tiles_of(weight(200, 130))
    with pytest.raises(ValueError, match=message):
        scaled_tiles(**{"data": codes, "scale": scale, **changes})
