"""Devices of other makes, each with its condition faked: what they are asked, and what they do without."""

import copy
import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.builders import random_pipeline, random_transformer
from tests.fake_card import FakeCard
from wan22 import devices
from wan22.accel import attention, attention_kernels, quantize
from wan22.accel.offload import devices as offload_devices
from wan22.accel.offload.devices import CudaDevice
from wan22.accel.parallel import processes
from wan22.accel.planning.machine import Machine
from wan22.checkpoints.files import quantized
from wan22.checkpoints.quantized_linear import QuantizedLinear, check_has_float8
from wan22.devices import HostCopies

pytestmark = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a real one")
CUDA = torch.device("cuda:0")


def have(monkeypatch, kind, **module):
    """Let there be a device of a kind, whose module of PyTorch answers so."""
    answers = {"is_available": lambda: True, "current_device": lambda: 0} | module
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    for name, value in answers.items():
        monkeypatch.setattr(getattr(torch, kind), name, value, raising=False)


# ---- which there is ----


def test_without_any():
    assert devices.card() is None
    assert processes.own_device() == torch.device("cpu")
    assert devices.name_of(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_card_of_any_make_is_found(kind, monkeypatch):
    have(monkeypatch, kind, get_device_name=lambda device: f"a card, {device}")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.card() == torch.device(kind)
    assert processes.own_device() == torch.device(kind, 1)
    assert devices.name_of(torch.device(kind, 1)) == f"a card, {kind}:1"


def test_mps_computes_in_the_hosts_memory(monkeypatch):
    """Plans are for the CPU there, and copies end before they return."""
    have(monkeypatch, "mps")
    assert devices.card() is None
    assert Machine.of(ram="8GB").device == torch.device("cpu")
    assert not devices.has_own_memory(torch.device("mps"))


def test_an_xpu_is_planned_for(monkeypatch):
    memory = {"memory_reserved": lambda device: 7, "memory_allocated": lambda device: 3}
    have(monkeypatch, "xpu", mem_get_info=lambda device: (5, 100), empty_cache=lambda: None, **memory)
    for name in ("measured_flops", "measured_bandwidth", "measured_pinning"):
        monkeypatch.setattr(f"wan22.accel.planning.machine.{name}", lambda device: 1.0)
    machine = Machine.of(ram="8GB")
    assert (machine.device, machine.vram) == (torch.device("xpu"), 5 + 7 - 3)


def test_the_memory_of_an_older_xpu(monkeypatch):
    """PyTorch 2.6 has no mem_get_info for it."""
    module = SimpleNamespace(
        get_device_properties=lambda device: SimpleNamespace(total_memory=100),
        memory_reserved=lambda device: 30,
    )
    monkeypatch.setattr(devices, "module_of", lambda device: module)
    assert devices.free_and_total(torch.device("xpu")) == (70, 100)


def test_an_xpu_moves_weights_by_its_own_streams(monkeypatch):
    asked = []
    stream = SimpleNamespace(record_event=lambda: "here")
    chosen = {"set_device": asked.append, "Stream": lambda device: asked.append(device) or stream}
    have(monkeypatch, "xpu", current_stream=lambda device: stream, **chosen)
    monkeypatch.setattr(offload_devices, "free_and_total", lambda device: (5, 9))
    device = CudaDevice()
    device.use_in_thread()
    assert asked == [torch.device("xpu:0")] * 2
    assert (device.release(torch.empty(1)), device.free_bytes()) == ("here", 5)
    with pytest.raises(MemoryError, match="the system does not pin"):  # PyTorch pins none without a device
        device.allocate_host(2**20)


# ---- copies to the host ----


def test_on_the_cpu_everything_is_there_at_once():
    copies = HostCopies(torch.device("cpu"))
    copies.put("first", torch.ones(1), torch.zeros(1))
    assert [(what, [t.item() for t in tensors]) for what, tensors in copies.arrived()] == [("first", [1, 0])]
    assert not list(copies.rest())


def test_on_a_card_each_is_there_once_the_next_is_on_its_way():
    with FakeCard() as card:
        copies = HostCopies(card.device)
        for i in range(3):
            copies.put(i, torch.full((2,), float(i), device="cuda"))
            assert [(what, x.tolist()) for what, (x,) in copies.arrived()] == [(i - 1, [i - 1] * 2)][: i > 0]
        assert [(what, x.tolist()) for what, (x,) in copies.rest()] == [(2, [2, 2])]
        assert [wait.idle for wait in card.recorded] == [False, False, True]


# ---- attention ----


def test_an_mi300_is_no_hopper(monkeypatch):
    """Though its numbers are greater; the kernels that PyTorch has for it remain."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(attention_kernels, "running_kernel", lambda device: "flash")
    monkeypatch.setattr(attention, "failure", lambda *arguments: None)
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_func=None))
    assert attention.select("auto", "cuda") == "native"
    found = attention.available("cuda")
    for name in ("flash_attn_3", "flash_attn_4", "cudnn", "sage"):
        assert found[name] == "it runs on NVIDIA's GPUs only"
    assert [found[name] for name in ("native", "flash", "efficient")] == [None] * 3


# ---- float8 ----


@pytest.mark.parametrize(
    ("kind", "capability", "hip", "compiles"),
    [
        ("cpu", None, None, True),
        ("cuda", (8, 0), None, False),  # A100
        ("cuda", (8, 6), None, False),  # RTX 3090
        ("cuda", (8, 9), None, True),
        ("cuda", (9, 0), None, True),
        ("cuda", (9, 4), "6.4", False),
        ("xpu", None, None, False),
    ],
)
def test_who_compiles_float8(kind, capability, hip, compiles, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.compiles_float8(torch.device(kind)) is compiles


@pytest.mark.parametrize("kind", quantized.FLOAT8)
def test_float8_numbers_by_integers(kind):
    data = torch.arange(256).to(torch.uint8)
    expected = data.view(kind).float()
    assert torch.equal(quantized.float8_numbers(data, kind).nan_to_num(7e4), expected.nan_to_num(7e4))
    assert expected.isnan().sum() in (2, 6)


@pytest.mark.parametrize(("compiles", "seen"), [(True, True), (False, False)])
def test_compiled_code_for_an_a100_has_no_float8(compiles, seen, monkeypatch):
    """A compiled block of a transformer, as PyTorch hands it to its compiler."""
    monkeypatch.setattr(quantized, "compiles_float8", lambda device: compiles)
    model = quantize.quantize(copy.deepcopy(random_transformer(1)), "fp8")
    layer = model.blocks[0].ffn.net[2]
    x = torch.randn(2, layer.in_features)
    assert isinstance(layer, QuantizedLinear)
    dtypes = set()

    def backend(graph, inputs):
        for node in graph.graph.nodes:
            if isinstance(found := node.meta.get("example_value"), torch.Tensor):
                dtypes.add(found.dtype)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), layer(x))
    assert (torch.float8_e4m3fn in dtypes) is seen


def test_mps_refuses_float8_by_name(monkeypatch):
    plain, mps = copy.deepcopy(random_transformer(1)), torch.device("mps")
    check_has_float8(plain, mps)
    monkeypatch.setattr(quantize, "get_module_execution_device", lambda model: mps)
    for method in ("fp8", "fp8_dynamic"):
        with pytest.raises(ValueError, match=f"method '{method}': MPS has no float8; 'int8' is the nearest"):
            quantize.quantize(plain, method)
    check_has_float8(quantize.quantize(copy.deepcopy(plain), "int8"), mps)
    monkeypatch.undo()
    pipe = random_pipeline(transformer=quantize.quantize(plain, "fp8"))
    for place in ("mps", mps):
        with pytest.raises(ValueError, match=r"WanTransformer3DModel is quantised to fp8, and MPS has no"):
            pipe.to(place)


# ---- compilers ----


def test_without_triton_nothing_is_compiled(monkeypatch, caplog):
    """As on Windows."""
    pipe = random_pipeline()
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    monkeypatch.setattr(type(pipe), "_execution_device", CUDA)
    with caplog.at_level(logging.WARNING):
        pipe.compile()
    assert pipe.compiled is None
    assert "nothing is compiled: for cuda that takes Triton" in caplog.text
    pipe.compile(backend="eager")
    assert pipe.compiled is not None
    pipe.uncompile()
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cpu"))
    pipe.compile()
    assert pipe.compiled is not None
    pipe.uncompile()
