"""Names and settings of sparse attention, and what is refused by name."""

import json

import pytest
import torch

from wan22 import RadialAttention, SpargeAttention
from wan22.accel.sparse.blocks import BlockSparse
from wan22.accel.sparse.settings import sparse_attention_of

GRID, CPU = (5, 4, 4), torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("radial", RadialAttention()),
        ("sparge", SpargeAttention()),
        (RadialAttention(0.5, block=64), RadialAttention(decay=0.5, block=64)),
        ({"method": "radial", "decay": 0.5}, RadialAttention(decay=0.5)),
        (' {"method": "sparge", "keep": 0.3, "dense_layers": 0}', SpargeAttention(0.3, dense_layers=0)),
    ],
)
def test_what_is_meant(given, expected):
    found = sparse_attention_of(given)
    assert found == expected
    if found is not None:
        assert sparse_attention_of(json.loads(json.dumps(found.plain()))) == found


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("radail", "attention='radail' must be one of 'radial', 'sparge'; the nearest is 'radial'"),
        ("sage", r"'sage' is a kernel.*set_attention_backend\('sage'\).*--attention-backend"),
        ({"method": "radial", "dekay": 1}, "attention 'radial' has no argument dekay; the nearest is decay"),
        ({"method": "all"}, "attention's method='all' must be one of 'radial', 'sparge'"),
        ({"method": []}, r"attention's method=\[\] must be one of"),
        ({}, "attention's method=None must be one of"),
        ('{"method"', "must be a name, or JSON such as"),
        (3, r"attention=3 must be a name such as 'radial', or settings such as RadialAttention\(\)"),
        (True, "attention=True must be a name"),
    ],
)
def test_what_is_refused(given, told):
    with pytest.raises(ValueError, match=told):
        sparse_attention_of(given)


@pytest.mark.parametrize("kind", [RadialAttention, SpargeAttention])
@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("dense_steps", 1.5, "dense_steps=1.5 must be a number, 0 or more, at most 1; the nearest is 1"),
        ("dense_steps", -1, "the nearest is 0"),
        ("dense_steps", "all", "dense_steps='all' must be a number"),
        ("dense_layers", -1, "dense_layers=-1 must be an int, at least 0; the nearest is 0"),
        ("dense_layers", 0.5, "dense_layers=0.5 must be an int"),
        ("dense_layers", True, "dense_layers=True must be an int"),
    ],
)
def test_settings_of_both(kind, setting, value, told):
    with pytest.raises(ValueError, match=told):
        kind(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("decay", -0.1, "decay=-0.1 must be a number, 0 or more; such as 0.8"),
        ("decay", float("nan"), "decay=nan must be a finite number"),
        ("decay", [0.8, 0.5], r"decay=\[0.8, 0.5\] must be a number"),
        ("block", 0, "block=0 must be an int, 1 to 1048576; the nearest is 1"),
        ("block", 2**40, "the nearest is 1048576"),
        ("block", "128", "block='128' must be an int"),
    ],
)
def test_settings_of_radial(setting, value, told):
    with pytest.raises(ValueError, match=told):
        RadialAttention(**{setting: value})


@pytest.mark.parametrize("keep", [0, -1, 1.5, "half"])
def test_settings_of_sparge(keep):
    with pytest.raises(ValueError, match=r"keep=.* must be a number, above 0, at most 1; such as 0.5"):
        SpargeAttention(keep)


def test_any_finite_decay_does():
    assert RadialAttention(1e308, block=1).share((9, 4, 4)) == pytest.approx(1, abs=0.5)


def test_blocks_on_cuda_are_those_of_its_kernels():
    cuda = torch.device("cuda")
    RadialAttention(block=256).check_device(cuda, torch.bfloat16, 128)
    RadialAttention(block=16).check_device(CPU, torch.bfloat16, 128)
    for block, nearest in ((16, 128), (200, 256)):
        told = f"block={block} must be a multiple of 128 on CUDA; the nearest is {nearest}"
        with pytest.raises(ValueError, match=told):
            RadialAttention(block=block).check_device(cuda, torch.bfloat16, 128)


def test_what_computes_by_layer_and_size():
    radial = RadialAttention(0.1, block=4, dense_layers=2)
    assert [radial.kernel_of(layer, GRID, CPU) is None for layer in range(4)] == [True, True, False, False]
    kernel = radial.kernel_of(2, GRID, CPU)
    assert isinstance(kernel, BlockSparse) and kernel.block == 4
    assert kernel is radial.kernel_of(3, GRID, CPU), "made once"
    assert kernel is not radial.kernel_of(3, (6, 4, 4), CPU)
    assert RadialAttention(0.1, block=128).kernel_of(1, GRID, CPU) is None, "one block keeps everything"


def test_steps_are_those_of_the_schedule():
    assert [RadialAttention().first_step(count) for count in (1, 4, 20, 40, 50)] == [0, 1, 6, 11, 14]
    assert RadialAttention(dense_steps=0).first_step(40) == 0
    assert RadialAttention(dense_steps=1).first_step(40) == 40
