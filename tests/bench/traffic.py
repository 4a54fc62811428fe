"""Bytes and kernels of a computation on a GPU that is not there, by fake tensors and the compiler's plan.

Eager: every operator that is neither a view, a matrix product nor attention is a kernel, which reads each of
its inputs and writes each of its outputs once; what is broadcast is read once. Root-mean-square normalisation
is one kernel, as it is on a GPU; `fused` functions of wan22 are one kernel each, where they apply.

Compiled: what torch.compile's scheduler for Triton plans, fused as it would be; no kernel is generated, so
neither Triton nor a GPU is needed.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from wan22.accel.planning.trace import LiveBytes
from wan22.models import fused

aten = torch.ops.aten
# Whose time is their arithmetic.
PRODUCTS = {aten.addmm, aten.mm, aten.bmm, aten.convolution, aten._addmm_activation}
# Memory without a kernel, and questions.
FREE = {aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.lift_fresh, aten.detach}
# What reads a tensor's sizes alone.
FACTORIES = {aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full}
# Writes that do not read what they write over.
PURE_WRITES = {aten.copy_, aten.fill_, aten.zero_}
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=141 << 30,
)


@dataclass
class Traffic:
    """What kernels other than products and attention do.

    Args:
        nbytes: read and written.
        kernels: how many touch more than `LARGE` bytes.
        parts: bytes by operator.
    """

    nbytes: int = 0
    kernels: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    paused: bool = False  # while what a kernel stands for is traced

    def add(self, name: str, nbytes: int) -> None:
        """Count a kernel."""
        if self.paused:
            return
        self.nbytes += nbytes
        self.kernels += nbytes >= LARGE
        self.parts[name] = self.parts.get(name, 0) + nbytes


LARGE = 1 << 20


def distinct_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements, each once: an expanded axis holds one."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


class _Operators(TorchDispatchMode):
    """Counts operators."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet is aten.convolution and args[0].is_contiguous(memory_format=torch.channels_last_3d):
            # As cuDNN's, of which fake tensors know for images alone.
            result = torch.empty_like(result, memory_format=torch.channels_last_3d)
        given, made = list(tensors((args, kwargs))), list(tensors(result))
        if func.namespace != "aten" or packet in PRODUCTS | FREE or not made:
            return result
        values = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
        written = [
            values[argument.name]
            for argument in func._schema.arguments
            if argument.name in values and argument.alias_info is not None and argument.alias_info.is_write
        ]
        if not written and storages(made) <= storages(given):
            return result  # a view
        given = [] if packet in FACTORIES else given
        written_only = written if packet in PURE_WRITES or "out" in kwargs else []
        read = [tensor for tensor in given if not any(tensor is each for each in written_only)]
        distinct = {id(tensor): tensor for tensor in read}.values()
        nbytes = sum(map(distinct_bytes, distinct)) + sum(map(distinct_bytes, made))
        self.traffic.add(packet.__name__, nbytes)
        return result


class _Kernels(TorchFunctionMode):
    """Counts functions that are one kernel on a GPU but several operators where they are traced."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.rms_norm, torch.rms_norm):
            return func(*args, **(kwargs or {}))
        x, *_ = given = list(tensors((args, kwargs)))
        result = torch.empty_like(x)
        self.traffic.add("rms_norm", sum(map(distinct_bytes, (*given, result))))
        return result


def tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors(value)


def storages(values: list[torch.Tensor]) -> set[Any]:
    """Return the memories of tensors."""
    return {value.untyped_storage()._cdata for value in values}


# ---- a GPU that is not there ----


@torch.library.custom_op("wan22_bench::attention", mutates_args=())
def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Be attention "b n l d" whose result lies in memory as "b l n d", as fused kernels return it."""
    return _attended(query, key, value)


@attention.register_fake
def _attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    b, n, tokens, _ = query.shape
    return query.new_empty((b, tokens, n, value.shape[-1])).transpose(1, 2)


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    return torch.ops.wan22_bench.attention(query, key, value)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Let tensors on "cuda" be made and traced, without memory, on a build of PyTorch for CPUs alone."""
    _register_guard()
    with torch.no_grad(), FakeTensorMode(), patch.object(F, "scaled_dot_product_attention", _sdpa):
        yield


@contextmanager
def on_gpu() -> Iterator[None]:
    """Let wan22's fused functions apply, and run as they are written, as if each were compiled."""
    with (
        patch.object(fused, "applies", lambda *args: not torch.compiler.is_compiling()),
        patch.object(fused, "_as_kernel", lambda function, args: function(*args)),
    ):
        yield


def _register_guard() -> None:
    """Let indexing enter and leave the device that is not there: by the CPU's guard, which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if not guards[1]:
        guards[1] = guards[0]  # by number of the device type: CPU, CUDA


def place(module: nn.Module, dtype: torch.dtype, wide: tuple[str, ...] = ()) -> None:
    """Give a module of the meta device fake weights on "cuda", those under names in `wide` in float32."""
    for path, owner in module.named_modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in list(table.items()):
                if tensor is None:
                    continue
                is_wide = bool(set(wide) & {*path.split("."), name})
                fake = torch.empty(tensor.shape, dtype=torch.float32 if is_wide else dtype, device="cuda")
                table[name] = nn.Parameter(fake, requires_grad=False) if table is owner._parameters else fake
    module.eval()


# ---- counts ----


def eager_traffic(function: Callable[[], Any], fuse: bool = False) -> Traffic:
    """Count a function's kernels, within `fake_gpu`; fuse: with those of wan22's fused functions."""
    traffic = Traffic()

    def as_kernel(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        traffic.paused = True
        try:
            result = function(*args)
        finally:
            traffic.paused = False
        traffic.add(function.__name__, sum(map(distinct_bytes, tensors((*args, result)))))
        return result

    with (
        patch.object(fused, "applies", lambda *args: fuse and not traffic.paused),
        patch.object(fused, "_as_kernel", as_kernel),
        _Operators(traffic),
        _Kernels(traffic),
    ):
        function()
    return traffic


class _Live(LiveBytes):
    """Counts the tensors that are alive, but for those within a kernel."""

    within_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.within_kernel:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def fused_peak(function: Callable[[], Any]) -> int:
    """Return the most bytes that a function's tensors take at once where fused kernels run, in `fake_gpu`."""
    live = _Live()

    def as_kernel(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        live.within_kernel = True
        try:
            result = function(*args)
        finally:
            live.within_kernel = False
        made = tuple(map(torch.empty_like, tensors((result,))))
        return made if isinstance(result, tuple) else made[0]

    applies = patch.object(fused, "applies", lambda *args: not live.within_kernel)
    with applies, patch.object(fused, "_as_kernel", as_kernel), live:
        function()
    return live.peak


def compiled_traffic(compile_and_run: Callable[[Callable[..., Any]], Any]) -> Traffic:
    """Count what a function compiles with the backend for torch.compile that it is given, in `fake_gpu`."""
    from torch._inductor.compile_fx import compile_fx

    traffic = Traffic()

    def scheduled(graph: Any, inputs: Any, **_: Any) -> Any:
        _schedule(graph, inputs, traffic)
        return graph

    torch._dynamo.reset()
    with _lowering_for_h200():
        compile_and_run(lambda graph, inputs: compile_fx(graph, inputs, inner_compile=scheduled))
    torch._dynamo.reset()
    return traffic


def _schedule(graph: Any, inputs: Any, traffic: Traffic) -> None:
    """Lower a graph and count its schedule, as PyTorch's own tests of the compiler's performance do."""
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode
    from torch._inductor.virtualized import V

    compile_fx.view_to_reshape(graph)
    mode = compile_fx.fake_tensor_prop(graph, inputs)
    compile_fx.record_original_output_strides(graph)
    with V.set_fake_mode(mode):
        compile_fx._recursive_post_grad_passes(graph, is_inference=True)
    lowered = GraphLowering(graph)
    with V.set_graph_handler(lowered), V.set_real_inputs([]), V.set_debug_handler(DebugContext()):
        lowered.run(*inputs)
        lowered._update_scheduler()
        for node in lowered.scheduler.nodes:
            if not isinstance(node, ExternKernelSchedulerNode):
                traffic.add(node.get_name(), node.get_read_write_buffers_sizes())


@contextmanager
def _lowering_for_h200() -> Iterator[None]:
    """Let the compiler plan for an H200: it asks for the device's properties, and whether there is Triton."""
    import torch._inductor.scheduler
    from torch._dynamo.device_interface import CudaInterface

    answers = {
        "get_device_properties": lambda device=None: H200,
        "get_compute_capability": lambda device=None: 90,
        "current_device": lambda: 0,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(CudaInterface, name, staticmethod(answer)))
        stack.enter_context(patch.object(torch._inductor.scheduler, "has_triton", lambda *args: True))
        yield
