"""attention(): the formula, kernels registered by name, the meta device."""

import pytest
import torch

from wan22.models import attention as attention_module
from wan22.models.attention import Kernel, attention, native, register


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(attention_module, "_kernels", dict(attention_module._kernels))


def reference(query, key, value):
    """The formula, in float64, one head of one sample at a time."""
    out = torch.empty(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for b in range(query.shape[0]):
        for n in range(query.shape[2]):
            q, k, v = (x[b, :, n].double() for x in (query, key, value))
            weights = (q @ k.T / k.shape[-1] ** 0.5).exp()
            out[b, :, n] = (weights / weights.sum(1, keepdim=True)) @ v
    return out


def make_inputs(l=33, s=33, n=2, d=24, dtype=torch.float32):  # noqa: E741
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, n, d, generator=generator).to(dtype) for length in (l, s, s)]


def error(found, inputs):
    expected = reference(*inputs)
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("head_dim", [24, 64, 128])
@pytest.mark.parametrize(("l", "s"), [(33, 33), (65, 7), (1, 50)])
def test_the_formula(l, s, head_dim, dtype, bound):  # noqa: E741
    inputs = make_inputs(l, s, 2, head_dim, dtype)
    out = attention(*inputs)
    assert out.dtype == dtype
    assert error(out, inputs) <= bound


def test_a_registered_kernel_computes():
    seen = []

    def doubled(query, key, value):
        seen.append(query.shape)
        return 2 * native(query, key, value)

    register("doubled", Kernel(doubled))
    inputs = make_inputs()
    torch.testing.assert_close(attention(*inputs, backend="doubled"), 2 * attention(*inputs))
    assert seen == [inputs[0].shape]


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"'flahs' is not registered, only 'native'.*accel\.attention\.use"):
        attention(*make_inputs(), backend="flahs")


def test_on_the_meta_device_no_kernel_runs():
    def refuse(*tensors):
        raise AssertionError("called")

    register("native", Kernel(refuse))
    query, key, value = (x.to("meta") for x in make_inputs(65, 7))
    out = attention(query, key, value)
    assert out.is_meta
    assert out.shape == query.shape
    assert out.dtype == query.dtype


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    register("doubled", Kernel(lambda q, k, v: 2 * native(q, k, v)))
    inputs = make_inputs()
    for backend in ("native", "doubled"):
        compiled = torch.compile(attention, fullgraph=True, backend="eager")
        found = compiled(*inputs, backend=backend)
        torch.testing.assert_close(found, attention(*inputs, backend=backend))
