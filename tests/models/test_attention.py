"""attention(): the formula, kernels registered by name, bias, the meta device."""

import pytest
import torch

from wan22.models import attention as attention_module
from wan22.models.attention import Kernel, attention, native, register


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(attention_module, "_kernels", dict(attention_module._kernels))


def reference(query, key, value, bias=None):
    """The formula, in float64, one head of one sample at a time."""
    out = torch.empty(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for b in range(query.shape[0]):
        for n in range(query.shape[2]):
            q, k, v = (x[b, :, n].double() for x in (query, key, value))
            weights = (q @ k.T / k.shape[-1] ** 0.5 + (0 if bias is None else bias[b].double())).exp()
            out[b, :, n] = (weights / weights.sum(1, keepdim=True)) @ v
    return out


def make_inputs(l=33, s=33, n=2, d=24, dtype=torch.float32, with_bias=False):  # noqa: E741
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, length, n, d, generator=generator).to(dtype) for length in (l, s, s)]
    return tensors + ([torch.randn(2, s, generator=generator).to(dtype)] if with_bias else [])


def error(found, inputs):
    expected = reference(*inputs)
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("head_dim", [24, 64, 128])
@pytest.mark.parametrize(("l", "s"), [(33, 33), (65, 7), (1, 50)])
def test_the_formula(l, s, head_dim, dtype, bound, with_bias):  # noqa: E741
    inputs = make_inputs(l, s, 2, head_dim, dtype, with_bias)
    out = attention(*inputs)
    assert out.dtype == dtype
    assert error(out, inputs) <= bound


def test_a_bias_of_log_c_counts_c_times():
    query, key, value = make_inputs(5, 4)
    bias = torch.tensor([[0.0, 0.0, 0.0, 3.0]]).log1p().expand(2, 4)
    repeats = torch.tensor([1, 1, 1, 4])
    expected = attention(query, *(x.repeat_interleave(repeats, 1) for x in (key, value)))
    torch.testing.assert_close(attention(query, key, value, bias), expected)


def test_a_registered_kernel_computes():
    seen = []

    def doubled(query, key, value):
        seen.append(query.shape)
        return 2 * native(query, key, value)

    register("doubled", Kernel(doubled))
    inputs = make_inputs(with_bias=True)
    plain, biased = attention(*inputs[:3]), attention(*inputs)
    torch.testing.assert_close(attention(*inputs[:3], backend="doubled"), 2 * plain)
    # It takes no bias, so such a call is the native one's.
    torch.testing.assert_close(attention(*inputs, backend="doubled"), biased)
    assert seen == [inputs[0].shape]

    register("tripled", Kernel(lambda q, k, v, bias=None: 3 * native(q, k, v, bias), takes_bias=True))
    torch.testing.assert_close(attention(*inputs, backend="tripled"), 3 * biased)


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"'flahs' is not registered, only 'native'.*accel\.attention\.use"):
        attention(*make_inputs(), backend="flahs")


def test_on_the_meta_device_no_kernel_runs():
    def refuse(*tensors):
        raise AssertionError("called")

    register("native", Kernel(refuse, takes_bias=True))
    query, key, value, bias = (x.to("meta") for x in make_inputs(65, 7, with_bias=True))
    out = attention(query, key, value, bias)
    assert out.is_meta
    assert out.shape == query.shape
    assert out.dtype == query.dtype


@pytest.mark.parametrize("with_bias", [False, True])
def test_compiles_without_a_graph_break(with_bias):
    torch._dynamo.reset()
    register("doubled", Kernel(lambda q, k, v: 2 * native(q, k, v)))
    inputs = make_inputs(with_bias=with_bias)
    for backend in ("native", "doubled"):
        compiled = torch.compile(attention, fullgraph=True, backend="eager")
        found = compiled(*inputs, backend=backend)
        torch.testing.assert_close(found, attention(*inputs, backend=backend))
