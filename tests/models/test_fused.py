"""Functions that are one kernel on a GPU: compiled here for the CPU, and the conditions for it made up."""

import copy
import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.bench.traffic import fake_gpu
from wan22.models import autoencoder_layers, fused, layers
from wan22.models.autoencoder_layers import (
    CausalConv3d,
    ResidualBlock,
    RMSNorm,
    convolve_normalized,
    normalized_silu,
)
from wan22.models.layers import Float32LayerNorm, Float32RMSNorm
from wan22.models.rope import rotary_tables
from wan22.models.temporal_cache import TemporalCache

B, L, N, D = 1, 24, 2, 16
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=GENERATOR).to(dtype)


@pytest.fixture
def compiling(monkeypatch):
    """Compile for the CPU what would be compiled for a GPU."""
    monkeypatch.setattr(
        fused, "applies", lambda *args: not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    )
    cached = fused.compiled
    forget(cached)
    yield
    forget(cached)


def forget(cached):
    cached.cache_clear()
    torch._dynamo.reset()
    counters.clear()


def calls(tokens, dtype):
    """Return calls of each function of a block, and their arguments, of which float32 stays so."""
    c = N * D
    x, update = randn(B, tokens, c), randn(B, tokens, c, dtype=dtype)
    gate, scale, shift = (randn(B, 1, c) for _ in range(3))
    norm, affine, rms = Float32LayerNorm(c, 1e-6, False), Float32LayerNorm(c, 1e-6), Float32RMSNorm(c, 1e-6)
    nn.init.normal_(affine.weight, generator=GENERATOR)
    nn.init.normal_(rms.weight, generator=GENERATOR)
    rotary = rotary_tables((2, 2, tokens // 4), D, x.device)

    def all_of(precision):
        """Call with everything in float64, or with what is given."""

        def e(tensor):
            return tensor if precision is None else tensor.to(precision)

        narrow = dtype if precision is None else precision
        tables = tuple(map(e, rotary))
        return {
            "norm": layers.normalized(norm, e(x), e(scale), e(shift), narrow),
            "gate and norm": layers.added_and_normalized(
                affine, e(x), e(update), e(gate), None, None, narrow
            ),
            "sum and norm": layers.added_and_normalized(
                norm, e(x), e(update), None, e(scale), e(shift), narrow
            ),
            "gate": layers.add_gated(e(x), e(update), e(gate)),
            "query": layers.rms_normalized(rms, e(update), tables),
            "query of text": layers.rms_normalized(rms, e(update), None),
        }

    return all_of


def worst_error(found, exact):
    pairs = zip(found, exact, strict=True) if isinstance(found, tuple) else [(found, exact)]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


CASES = [(torch.bfloat16, 3e-3), pytest.param(torch.float32, 3e-7, marks=pytest.mark.slow)]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), CASES)
def test_compiled_functions_equal_float64(compiling, monkeypatch, dtype, bound):
    run = calls(L, dtype)
    found = run(None)
    assert len(fused._failed) == 0
    assert counters["stats"]["unique_graphs"] >= 6
    graphs = counters["stats"]["unique_graphs"]
    other = calls(2 * L, dtype)(None)
    assert counters["stats"]["unique_graphs"] == graphs, "another number of tokens compiles nothing"
    assert other["gate"].shape == (B, 2 * L, N * D)
    monkeypatch.setattr(fused, "applies", lambda *args: False)
    plain, exact = run(None), run(torch.float64)
    for name, value in found.items():
        dtypes = [e.dtype for e in (value if isinstance(value, tuple) else (value,))]
        assert dtypes == [e.dtype for e in (plain[name] if isinstance(value, tuple) else (plain[name],))]
        assert worst_error(value, exact[name]) <= bound, name
        assert worst_error(value, exact[name]) <= 1.1 * worst_error(plain[name], exact[name]) + 1e-8, name


def frames(layout, dtype, t=3):
    """Return "b c t h w" as convolutions return it, or as a strip of rows of that."""
    x = 30 * randn(1, 24, t, 6, 5, dtype=dtype)
    if layout == "innermost":
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x[:, :, :, 1:4] if layout == "strip" else x


@torch.no_grad()
@pytest.mark.parametrize("layout", ["contiguous", "innermost", "strip"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.bfloat16, 3e-3)])
def test_norm_and_silu_of_the_autoencoder_compiled(compiling, monkeypatch, layout, dtype, bound):
    norm = RMSNorm(24)
    nn.init.normal_(norm.gamma, 1, 0.3, generator=GENERATOR)
    x = frames(layout, dtype)
    norm.to(dtype)
    exact = torch.nn.functional.silu(copy.deepcopy(norm).double()(x.double()))
    y = normalized_silu(norm, x)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 1
    assert normalized_silu(norm, frames(layout, dtype, t=4)).shape[2] == 4
    assert counters["stats"]["unique_graphs"] == graphs
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert y.stride(1) == (1 if layout == "innermost" else y[0, 0].numel())
    assert not fused._failed
    assert worst_error(y, exact) <= bound
    monkeypatch.setattr(fused, "applies", lambda *args: False)
    plain = normalized_silu(norm, x)
    assert worst_error(y, exact) <= 1.1 * worst_error(plain, exact) + 1e-8


def norm_and_conv(layout, dtype):
    norm, conv = RMSNorm(24), CausalConv3d(24, 8)
    nn.init.normal_(norm.gamma, 1, 0.3, generator=GENERATOR)
    norm.to(dtype)
    conv.to(dtype)
    if layout == "innermost":
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return norm, conv


@torch.no_grad()
@pytest.mark.parametrize("layout", ["contiguous", "innermost"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_norm_and_silu_are_written_where_the_convolution_reads(compiling, monkeypatch, layout, dtype, bound):
    norm, conv = norm_and_conv(layout, dtype)
    chunks = [frames(layout, dtype, t=t).repeat(2, 1, 1, 1, 1) for t in (3, 4, 2)]
    chunks = [chunk.contiguous(memory_format=conv.layout) for chunk in chunks]
    monkeypatch.setattr(autoencoder_layers, "normalized_silu", lambda *args: pytest.fail("written twice"))
    cache = TemporalCache()
    found = [convolve_normalized(conv, norm, chunk, cache) for chunk in chunks]
    assert counters["stats"]["unique_graphs"] == 1, "another number of frames compiles nothing"
    assert not fused._failed
    monkeypatch.undo()
    monkeypatch.setattr(fused, "applies", lambda *args: False)
    plain, exact = TemporalCache(), TemporalCache()
    wide_norm, wide_conv = (copy.deepcopy(each).double() for each in (norm, conv))
    for y, chunk in zip(found, chunks, strict=True):
        reference = convolve_normalized(wide_conv, wide_norm, chunk.double(), exact)
        slow = convolve_normalized(conv, norm, chunk, plain)
        assert (y.shape, y.dtype) == (slow.shape, dtype)
        assert worst_error(y, reference) <= min(bound, 1.1 * worst_error(slow, reference) + 1e-7)


@torch.no_grad()
def test_what_lies_between_norm_and_convolution_sees_its_result(compiling, monkeypatch):
    """Hooks, dropout, strips; a single frame, another layout and other layers go the plain way, too."""
    norm, conv = norm_and_conv("contiguous", torch.float32)
    x, written = frames("contiguous", torch.float32), []
    monkeypatch.setattr(RMSNorm, "write_silu", lambda self, x, out: written.append(x) or out.copy_(x))
    convolve_normalized(conv, norm, x)
    assert len(written) == 1
    for module in (conv, norm):
        handle = module.register_forward_pre_hook(lambda module, args: None)
        convolve_normalized(conv, norm, x)
        handle.remove()
    convolve_normalized(conv, norm, x[:, :, :1].contiguous())
    convolve_normalized(conv, norm, frames("innermost", torch.float32))
    convolve_normalized(conv, nn.Identity(), x)
    cache = TemporalCache()
    for rows in cache.in_strips([(0, 3), (3, 6)]):
        convolve_normalized(conv, norm, x[:, :, :, rows].contiguous(), cache)
    assert len(written) == 1
    block = ResidualBlock(24, 24, dropout=0.5)
    block(x)
    assert len(written) == 2, "its second convolution follows dropout"
    block.eval()(x)
    assert len(written) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_half_types_on_other_devices(monkeypatch, dtype):
    """The product in two dtypes is as exact, and has the same gradients."""
    norm = RMSNorm(24)
    nn.init.normal_(norm.gamma, 1, 0.3, generator=GENERATOR)
    norm.to(dtype)
    x = frames("contiguous", dtype)
    exact = copy.deepcopy(norm).double()(x.double()).detach()
    found = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(autoencoder_layers, "ONE_DTYPE", devices)
        with torch.no_grad():
            y = norm(x)
        norm.gamma.grad = None
        norm(x).float().sum().backward()
        found.append((y, norm.gamma.grad))
    (plain, plain_gradient), (other, gradient) = found
    assert other.dtype == dtype
    assert worst_error(other, exact) <= 1.01 * worst_error(plain, exact)
    assert worst_error(gradient, plain_gradient) <= 1e-2


@torch.no_grad()
def test_more_kinds_of_arguments_than_the_compilers_limit(compiling, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for width in range(16, 16 + 12 * 8, 8):
        x, gate = randn(1, L, width), randn(1, 1, width)
        assert torch.allclose(layers.add_gated(x, x, gate), x + x * gate, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 12
    assert not fused._failed


def test_a_compiler_that_fails_costs_speed_alone(compiling, monkeypatch, caplog):
    tried = []

    def broken(*args):
        tried.append(args)
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(fused, "compiled", lambda function: broken)
    monkeypatch.setattr(fused, "_failed", set())
    x, gate = randn(1, L, 16), randn(1, 1, 16)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(layers.add_gated(x, x, gate), torch.addcmul(x, x, gate))
    assert len(tried) == 1
    assert caplog.messages == ["add_gated runs unfused: torch.compile fails here: no C compiler"]


def test_a_lack_of_memory_is_no_failure_of_the_compiler(compiling, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(fused, "compiled", lambda function: full)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        layers.add_gated(randn(1, L, 16), randn(1, L, 16), randn(1, 1, 16))
    assert not fused._failed


def test_what_does_not_compile_and_does_not_run_raises_its_own_error(compiling):
    with torch.no_grad(), pytest.raises(RuntimeError, match="size of tensor"):
        layers.add_gated(randn(1, L, 16), randn(1, L, 24), randn(1, 1, 16))
    assert not fused._failed


def test_conditions(monkeypatch):
    monkeypatch.setattr(fused, "has_compiler", lambda: True)
    x = randn(1, L, 16)
    assert not fused.applies(x)
    with fake_gpu():
        assert not fused.applies(torch.empty(1, L, 16, device="cuda")), "fake tensors are traced"
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert fused.applies(x, 1e-6, None, torch.bfloat16)
    assert fused.applies(nn.Parameter(x, requires_grad=False))
    weight = nn.Parameter(randn(16))
    assert not fused.applies(x, weight)
    with torch.no_grad():
        assert fused.applies(x, weight)
    monkeypatch.setattr(fused, "has_compiler", lambda: False)
    assert not fused.applies(x)
    monkeypatch.setattr(fused, "has_compiler", lambda: True)
    fused.set_fused(False)
    try:
        assert not fused.applies(x)
    finally:
        fused.set_fused()


def test_within_torch_compile_nothing_is_compiled_apart(monkeypatch):
    monkeypatch.setattr(fused, "has_compiler", lambda: True)
    monkeypatch.setattr(fused, "_as_kernel", lambda *args: pytest.fail("compiled apart"))
    torch._dynamo.reset()
    with fake_gpu():
        x, gate = torch.empty(1, L, 16, device="cuda"), torch.empty(1, 1, 16, device="cuda")
        run = torch.compile(lambda: layers.add_gated(x, x, gate), backend="eager", fullgraph=True)
        assert run().shape == x.shape
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["hook", "forward"])
def test_a_hooked_norm_is_called(kind):
    norm, x, seen = Float32LayerNorm(16, 1e-6), randn(1, L, 16), []
    if kind == "hook":
        norm.register_forward_hook(lambda module, args, output: seen.append(output))
    else:
        inner = norm.forward
        norm.forward = lambda input: seen.append(inner(input)) or seen[0]
    y = layers.normalized(norm, x, None, None, torch.bfloat16)
    assert torch.equal(seen[0].bfloat16(), y)


def test_gelu_is_the_epilogue_of_the_product_on_cuda():
    layer = layers.GELU(16, 32, "tanh").bfloat16().requires_grad_(False)
    x = randn(2, L, 16, dtype=torch.bfloat16)
    assert not layer._is_epilogue(x), "PyTorch's GELU after a product on the CPU is another"
    on_gpu = SimpleNamespace(is_cuda=True, dtype=x.dtype, requires_grad=False)
    assert layer._is_epilogue(on_gpu)
    hook = layer.proj.register_forward_hook(lambda *args: None)
    assert not layer._is_epilogue(on_gpu)
    hook.remove()
    assert not layer.float()._is_epilogue(on_gpu)
    assert not layers.GELU(16, 32, "none").bfloat16().requires_grad_(False)._is_epilogue(on_gpu)
    on_gpu.requires_grad = True
    assert not layer.bfloat16()._is_epilogue(on_gpu)
