"""Attention kernels: each equals the formula, a wrong one is found out, names and reasons are told."""

import importlib
import importlib.machinery
import logging
import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from tests.builders import random_transformer
from tests.models.test_attention import error, make_inputs
from wan22.accel import attention as accel
from wan22.accel import attention_kernels
from wan22.accel.attention import add, available, describe, select, use
from wan22.accel.attention_kernels import Backend, running_kernel
from wan22.models import attention as registry
from wan22.models.attention import attention, native

ON_CPU = ["native", "flash", "math"]
BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
CUDA = torch.cuda.is_available()


def anywhere(device, dtype, head_dim):
    return None


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_kernels", dict(registry._kernels))
    monkeypatch.setattr(accel, "_backends", dict(accel._backends))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [24, 64, 128])
@pytest.mark.parametrize(("l", "s"), [(33, 33), (65, 7), (1, 50)])
@pytest.mark.parametrize("name", ON_CPU)
def test_kernels_equal_the_formula(name, l, s, head_dim, dtype):  # noqa: E741
    assert select(name, "cpu", dtype, head_dim) == name
    inputs = make_inputs(l, s, 2, head_dim, dtype)
    out = attention(*inputs, backend=name)
    assert out.dtype == dtype
    assert error(out, inputs) <= BOUND[dtype]


def operators_of(function):
    with profile(activities=[ProfilerActivity.CPU]) as record:
        function()
    return {event.key for event in record.key_averages()}


def test_a_name_means_its_kernel():
    inputs = make_inputs()
    for name in ("flash", "math"):
        select(name, "cpu", torch.float32, 24)
    flash = operators_of(lambda: attention(*inputs, backend="flash"))
    math = operators_of(lambda: attention(*inputs, backend="math"))
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in flash - math
    assert "aten::_scaled_dot_product_attention_math" in math - flash


@pytest.mark.parametrize("restricted", [None, "MATH"])
def test_the_running_kernel_is_the_one_that_runs(restricted):
    """Also where the process is restricted to one, as by diffusers or by hand."""
    query = torch.randn(1, 64, 2, 32)
    choice = getattr(SDPBackend, restricted) if restricted else list(SDPBackend.__members__.values())[1:]
    with sdpa_kernel(choice):
        told = running_kernel("cpu", torch.float32, 32, 64)
        ran = operators_of(lambda: native(query, query, query))
        assert f"PyTorch {torch.__version__}'s {told} kernel" in describe(
            "native", "cpu", torch.float32, 32, 64
        )
    assert told == ("math" if restricted else "flash")
    assert any(f"_{told}" in name for name in ran if name.startswith("aten::_scaled_dot_product")), ran
    assert describe("math") == "math"


# ---- choosing ----


def test_auto_on_cpu_is_native():
    assert select("auto", "cpu") == select() == "native"


def test_reasons_are_told():
    reasons = available("cpu", torch.bfloat16, 128)
    assert [name for name, reason in reasons.items() if reason is None] == ON_CPU
    assert reasons["cudnn"] == reasons["flash_attn_3"] == "it runs on cuda only"
    assert set(reasons) == {
        *(*ON_CPU, "cudnn", "efficient"),
        *("flash_attn_2", "flash_attn_3", "flash_attn_4", "sage"),
    }
    if not CUDA:
        assert available("cuda")["efficient"] == "there is no GPU"


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "name", "reason"),
    [
        ((7, 5), torch.float16, 128, "flash_attn_2", r"compute capability 8\.0 to .*has 7\.5"),
        ((10, 0), torch.bfloat16, 128, "flash_attn_3", r"compute capability 8\.0 to 9\.9.*has 10\.0"),
        ((8, 9), torch.bfloat16, 128, "flash_attn_4", r"compute capability 9\.0 to .*has 8\.9"),
        ((9, 0), torch.float32, 128, "cudnn", r"float16 and torch\.bfloat16 only"),
        ((9, 0), torch.bfloat16, 20, "flash", "head size must be a multiple of 8"),
        ((9, 0), torch.bfloat16, 128, "flash_attn_3", "flash-attn-3 is not installed"),
        (
            (9, 0),
            torch.bfloat16,
            128,
            "sage",
            "sageattention is not installed: pip install --no-build-iso.* sageattention==",
        ),
    ],
)
def test_what_a_gpu_is_told(capability, dtype, head_dim, name, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for module in ("flash_attn_interface", "sageattention"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"attention backend '{name}' cannot be used on cuda.*{reason}"):
        select(name, "cuda", dtype, head_dim)


@pytest.mark.parametrize(
    ("capability", "chosen"), [((9, 0), "flash_attn_3"), ((10, 0), "flash_attn_4"), ((8, 9), "native")]
)
def test_auto_takes_the_fastest_for_the_card(capability, chosen, monkeypatch):
    """With every library there; their kernels are not run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(accel, "_function", lambda backend: native)
    monkeypatch.setattr(accel, "failure", lambda *arguments: None)
    assert select("auto", "cuda") == chosen
    assert chosen in registry._kernels


@pytest.mark.parametrize(
    ("capability", "running", "chosen"),
    [
        ((9, 0), "flash", "cudnn"),
        ((10, 0), "flash", "cudnn"),
        ((9, 0), "cudnn", "native"),
        ((8, 9), "flash", "native"),
    ],
)
def test_auto_takes_cudnns_kernel_where_pytorch_passes_it_over(capability, running, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention_kernels, "running_kernel", lambda device: running)
    monkeypatch.setattr(accel, "failure", lambda *arguments: None)
    for module in ("flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, module, None)
    assert select("auto", "cuda") == chosen
    assert select("auto", "cuda", torch.float32) == "native"


def test_an_unknown_name_lists_those_that_there_are():
    with pytest.raises(ValueError, match=r"'flahs' .*none of that name; available: native, flash, math"):
        select("flahs", "cpu")


# ---- the self-test ----


def shifted(query, key, value):
    """Attention with a wrong scale."""
    return native(query * 1.1, key, value)


def broken(query, key, value):
    raise RuntimeError("no kernel image")


FAULTS = [
    (shifted, r"deviates by \d\.\de-\d\d from float32 attention .* 0\.0001 is allowed"),
    (lambda q, k, v: native(q, k, v) * float("nan"), "deviates by nan"),
    # Right for self-attention, and wrong where there are fewer keys than queries.
    (lambda q, k, v: native(q, k, v) if q.shape == k.shape else native(q, k, v) * 1.01, "131 .* 77 keys"),
    (lambda q, k, v: native(q, k, v)[:, :, :, :8], "returns shape"),
    (broken, "raises RuntimeError: no kernel image"),
]


@pytest.mark.parametrize(("function", "message"), FAULTS)
def test_a_kernel_that_fails_is_dropped(function, message, caplog):
    add(Backend("fake", lambda: function, anywhere, preferred=lambda device: True))
    with caplog.at_level(logging.WARNING, "wan22"):
        assert select("auto", "cpu", torch.float32) == "native"
    assert "attention backend 'fake' is left out on cpu in torch.float32" in caplog.text
    with pytest.raises(ValueError, match=rf"'fake' cannot be used on cpu.*{message}.*available: native,"):
        select("fake", "cpu", torch.float32)
    with pytest.raises(ValueError, match="not registered"):
        attention(*make_inputs(), backend="fake")


def test_a_check_without_memory_is_made_again(caplog):
    full = [True]

    def kernel(query, key, value):
        if full:
            raise torch.OutOfMemoryError("none is left")
        return native(query, key, value)

    add(Backend("fake", lambda: kernel, anywhere, preferred=lambda device: True))
    with pytest.raises(ValueError, match="no memory to check it: none is left"):
        select("fake", "cpu", torch.float32)
    assert select("auto", "cpu", torch.float32) == "native"
    assert "no memory to check it" in caplog.text
    full.clear()
    assert select("auto", "cpu", torch.float32) == "fake"


def test_a_right_kernel_is_taken_and_checked_once():
    calls = []

    def right(query, key, value):
        calls.append(query.dtype)
        return native(query, key, value)

    add(Backend("fake", lambda: right, anywhere, preferred=lambda device: True))
    for _ in range(2):
        assert select("auto", "cpu", torch.bfloat16) == "fake"
    assert calls == [torch.bfloat16] * len(accel.LENGTHS)
    assert select("fake", "cpu", torch.float32) == "fake"
    assert len(calls) == 2 * len(accel.LENGTHS)


def test_a_lossy_kernel_is_taken_by_name_alone():
    def rounded(query, key, value):
        return native(*(x.to(torch.float8_e4m3fn).to(x) for x in (query, key, value)))

    def too_lossy(query, key, value):
        return native(*(x.to(torch.float8_e5m2).to(x) * 1.3 for x in (query, key, value)))

    for name, function in (("fp8", rounded), ("worse", too_lossy)):
        add(Backend(name, lambda f=function: f, anywhere, exact=False, preferred=lambda device: True))
    assert select("auto", "cpu") == "native"
    assert select("fp8", "cpu") == "fp8"
    with pytest.raises(ValueError, match=r"deviates by .* 0\.1 is allowed"):
        select("worse", "cpu")
    add(Backend("exact", lambda: rounded, anywhere))
    with pytest.raises(ValueError, match="deviates"):
        select("exact", "cpu")


# ---- other libraries ----


def install(monkeypatch, module, function):
    """Pretend that a library with one function is installed, and that the machine has what it needs."""
    stand_in = types.ModuleType(module)
    stand_in.__spec__ = importlib.machinery.ModuleSpec(module, None)
    name = "sageattn" if module == "sageattention" else "flash_attn_func"
    setattr(stand_in, name, function)
    monkeypatch.setitem(sys.modules, module, stand_in)


@pytest.mark.parametrize(
    ("name", "module"), [("flash_attn_3", "flash_attn_interface"), ("sage", "sageattention")]
)
def test_a_library_behind_an_operator(name, module, monkeypatch):
    """A stand-in with the library's signature, some versions of which return more than the result."""

    def function(q, k, v, **options):
        assert options == ({"tensor_layout": "NHD"} if name == "sage" else {})
        assert not torch.compiler.is_compiling(), "torch.compile must not look into it"
        out = native(q, k, v)
        return out if name == "sage" else (out, torch.zeros(3))

    install(monkeypatch, module, function)
    kernel = accel._backends[name].load()
    inputs = make_inputs(65, 7)
    assert error(kernel(*inputs), inputs) <= 2e-6
    torch._dynamo.reset()
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    assert error(compiled(*inputs), inputs) <= 2e-6


def test_a_library_that_does_not_import(monkeypatch, caplog):
    install(monkeypatch, "flash_attn_interface", None)
    delattr(sys.modules["flash_attn_interface"], "flash_attn_func")
    add(Backend("fake", accel._backends["flash_attn_3"].load, anywhere, preferred=lambda device: True))
    assert "no attribute 'flash_attn_func'" in available("cpu")["fake"]
    assert select("auto", "cpu") == "native"
    assert "'fake' is left out on cpu" in caplog.text
    assert "no attribute 'flash_attn_func'" in caplog.text


@pytest.mark.parametrize(
    ("missing", "installed"),
    [("flash_attn", False), ("flash_attn.cute", False), ("cutlass", True), ("flash_attn.cute.ops", True)],
)
def test_a_library_that_is_not_there_is_no_news(missing, installed, monkeypatch, caplog):
    """Nor is another library of the same package; one that lacks what it needs is."""

    def fail(name):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(importlib, "import_module", fail)
    add(Backend("fake", accel._backends["flash_attn_4"].load, anywhere, preferred=lambda device: True))
    assert select("auto", "cpu") == "native"
    assert ("left out" in caplog.text) == installed
    assert ("flash-attn-4 is not installed" in available("cpu")["fake"]) != installed


# ---- models ----


@pytest.mark.parametrize("name", ["math", "flash"])
def test_a_model_computes_with_it_compiled_or_not(name):
    model = random_transformer(0)
    arguments = (torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 32))
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(*arguments).sample
        assert use(model, name) == name
        used = operators_of(lambda: model(*arguments))
        torch.testing.assert_close(model(*arguments).sample, expected, rtol=0, atol=1e-5)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert use(compiled, name) == name
        torch.testing.assert_close(compiled(*arguments).sample, expected, rtol=0, atol=1e-5)
        assert use(model) == "native"
        assert torch.equal(model(*arguments).sample, expected)
    assert any(name in operator for operator in used if operator.startswith("aten::_scaled_dot"))


@pytest.mark.parametrize("name", ON_CPU)
def test_compiles_without_a_graph_break(name):
    select(name, "cpu", torch.float32, 24)
    inputs = make_inputs()
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs, backend=name), attention(*inputs, backend=name))


def test_gradients_flow():
    for name in ("flash", "math"):
        select(name, "cpu", torch.float32, 24)
        inputs = [x.requires_grad_() for x in make_inputs()]
        found = torch.autograd.grad(attention(*inputs, backend=name).square().sum(), inputs)
        expected = torch.autograd.grad(native(*inputs).square().sum(), inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("l", "s"), [(256, 256), (131, 77)])
@pytest.mark.parametrize("name", list(accel._backends))
def test_kernels_equal_the_formula_on_a_gpu(name, l, s, dtype):  # noqa: E741
    if reason := available("cuda", dtype, 128)[name]:
        pytest.skip(reason)
    assert select(name, "cuda", dtype, 128) == name
    inputs = make_inputs(l, s, 2, 128, dtype)
    out = attention(*(x.cuda() for x in inputs), backend=name)
    assert error(out.cpu(), inputs) <= (accel.BOUNDS[dtype] if name != "sage" else accel.LOSSY_BOUND)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_a_gpus_running_kernel_is_the_one_that_runs():
    query = torch.randn(1, 512, 2, 128, dtype=torch.bfloat16, device="cuda")
    ran = operators_of(lambda: native(query, query, query))
    told = running_kernel("cuda", torch.bfloat16, 128, 512)
    assert any(f"_{told}" in name for name in ran if name.startswith("aten::_scaled_dot_product")), ran


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_a_model_on_a_gpu(name):
    if reason := available("cuda", torch.bfloat16, 24)[name]:
        pytest.skip(reason)
    model = random_transformer(0).cuda().bfloat16()
    text = torch.randn(1, 5, 32, dtype=torch.bfloat16, device="cuda")
    arguments = (torch.randn(1, 16, 2, 4, 4).cuda(), torch.tensor([500.0]).cuda(), text)
    with torch.no_grad():
        expected = model(*arguments).sample
        assert use(model, name) == name
        found = model(*arguments).sample
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*arguments).sample
    assert (found - expected).norm() / expected.norm() <= 1e-2
    assert (compiled - expected).norm() / expected.norm() <= 1e-2
