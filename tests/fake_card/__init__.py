"""A pretended CUDA device that computes: real numbers on the CPU, and a record of what makes the host wait.

    with FakeCard() as card:
        pipe.to("cuda")
        video = pipe("a red circle")
    assert not card.waits("denoise")

Tensors on the card are wrappers around CPU tensors. Operators see their device, run the CPU's kernels on what
is inside and wrap the results, so that a call on the card gives the CPU's numbers. As on a real card, an
operator refuses to mix tensors of the host with the card's, and a copy to the host that does not block
arrives when its event is waited for: until then the host reads NaN.

Compiled models do not run here: torch.compile refuses to compile beneath the dispatch mode by which the card
sees operators. `tests/models/test_fused.py` and `tests/accel/test_compile.py` compile for the CPU instead.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # before the card answers in place of torch.cuda, whose functions it lists
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import wan22

from .libraries import answers
from .tensors import CARD, CardTensor, Devices, Operators, active, on_card

__all__ = ["CardTensor", "FakeCard"]

aten = torch.ops.aten
ROOT = Path(wan22.__file__).parent
_COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
_INDEXING = {
    *(aten.index.Tensor, aten.index_put_.default, aten.index_put.default),
    *(aten._index_put_impl_.default, aten._unsafe_index.Tensor),
}
# The size of their results, or a branch on the host, depends on values.
_READS = {
    aten._local_scalar_dense.default: "reads a number",
    aten.equal.default: "compares",
    aten.is_nonzero.default: "reads a number",
    aten.nonzero.default: "counts",
    aten.masked_select.default: "counts",
    aten._unique2.default: "counts",
    aten.unique_dim.default: "counts",
    aten.unique_consecutive.default: "counts",
    aten.repeat_interleave.Tensor: "counts",
}


@dataclass(frozen=True)
class Wait:
    """The host waited for the card.

    Args:
        kind: what for, such as "reads a number", "download", "upload" or "event".
        where: the innermost function of wan22, "pipelines/call/checks.py:check_finite".
        line: its line.
        functions: names of all of wan22's functions on the stack.
        idle: whether nothing was queued behind what was waited for: the card has no work meanwhile.
    """

    kind: str
    where: str
    line: int
    functions: frozenset[str]
    idle: bool = True

    def __str__(self) -> str:
        return f"{self.kind} in {self.where}, line {self.line}"


class FakeCard:
    """A card, while the context lasts.

    Args:
        capability: its compute capability.
        memory: its bytes.
    """

    def __init__(self, capability=(8, 0), memory=80 * 10**9):
        self.device, self.capability, self.memory = CARD, capability, memory
        self.queued = 0  # operators so far
        self.recorded = []
        self.downloads = []  # dtypes of what was copied to the host
        self._pinned = {}  # host memory that copies run from in the background, by address
        self._leaving = []  # copies to the host that have not arrived

    def waits(self, *functions):
        """Return what made the host wait within any of these functions of wan22."""
        return [wait for wait in self.recorded if wait.functions & set(functions)]

    def __enter__(self):
        assert not active, "there is one card"
        active.append(self)
        self._stack = ExitStack()
        try:
            for target, values in answers(self).items():
                for name, value in values.items():
                    self._stack.enter_context(mock.patch.object(target, name, value, create=True))
            before = torch.__future__.get_swap_module_params_on_conversion()
            torch.__future__.set_swap_module_params_on_conversion(True)
            self._stack.callback(torch.__future__.set_swap_module_params_on_conversion, before)
            self._stack.enter_context(Operators())
            self._stack.enter_context(Devices())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc):
        self._stack.close()
        active.clear()

    # ---- operators ----

    def run(self, func, args, kwargs):
        """Run an operator on the tensors inside of the card's, and wrap what it returns."""
        flat, form = tree_flatten((args, kwargs))
        cards = [value for value in flat if isinstance(value, CardTensor)]
        device = kwargs.get("device")
        if not cards and (device is None or torch.device(device).type != "cuda"):
            return func(*args, **kwargs)
        host = [v for v in flat if isinstance(v, Tensor) and not isinstance(v, CardTensor)]
        self._refuse_mixture(func, cards, host)
        download = self._record(func, args, kwargs)
        real_args, real_kwargs = tree_unflatten([_on_host(value) for value in flat], form)
        if download is not None:
            return self._download(func, args, real_args, real_kwargs, download)
        out = func(*real_args, **real_kwargs)
        self.queued += 1
        outer = {id(tensor.numbers): tensor for tensor in cards}
        return tree_map_only(Tensor, lambda x: outer[id(x)] if id(x) in outer else on_card(x), out)

    def _refuse_mixture(self, func, cards, host):
        if not cards or func in _COPIES or func in _INDEXING:
            return
        for tensor in host:
            # A number on the host is an argument of an elementwise kernel.
            if tensor.ndim or torch.Tag.pointwise not in func.tags:
                raise RuntimeError(f"{func} got tensors on the host, {tuple(tensor.shape)}, and on the card")

    def _record(self, func, args, kwargs):
        """Record what makes the host wait; of a copy to the host, return whether it blocks."""
        if func in _READS:
            self.read(_READS[func])
        elif func in _INDEXING:
            for index in (each for each in args[1] if each is not None):
                self.record_index(index)
        elif func is aten._to_copy.default:
            device = kwargs.get("device")
            from_card = isinstance(args[0], CardTensor)
            if from_card and device is not None and torch.device(device).type == "cpu":
                return not kwargs.get("non_blocking", False)
            if not from_card:
                self.upload(args[0], kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            target, source = args[:2]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            if not isinstance(target, CardTensor):
                return waits or not self.is_pinned(target)
            if not isinstance(source, CardTensor) and source.ndim:
                self.upload(source, not waits)
        return None

    def record_index(self, index):
        """Record what an index makes the host wait for: the number of true values, or a copy of it."""
        if index.dtype in (torch.bool, torch.uint8):
            self.read("counts")
        elif not isinstance(index, CardTensor) and index.ndim:
            self.read("upload")

    def upload(self, source, in_background=False):
        """Record a copy from the host; one behind a copy to the same memory reads what that has brought."""
        if not in_background or not self.is_pinned(source):
            self.read("upload")
        memory = source.untyped_storage().data_ptr()
        self._arrive(lambda queued, target: target.untyped_storage().data_ptr() == memory)

    def _download(self, func, args, real_args, real_kwargs, blocks):
        """Copy to the host: at once if that blocks, and else for who waits for what is queued now."""
        self.downloads.append((args[0] if func is aten._to_copy.default else args[1]).dtype)
        if blocks:
            self.read("download")
            return func(*real_args, **real_kwargs)
        self.queued += 1
        if func is aten.copy_.default:
            target, value = args[0], real_args[1].to(args[0].dtype, copy=True)
        else:
            value = func(*real_args, **real_kwargs)
            target = self.pin(torch.empty_like(value))
        target.untyped_storage().fill_(255)  # NaN in every floating-point dtype
        self._leaving.append((self.queued, target, value))
        return target

    def read(self, kind, idle=True, until=None):
        """Record that the host waits for what was queued, `until` a point or all; copies arrive."""
        frame, names, place = sys._getframe(1), [], ("", 0)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                name = frame.f_code.co_name
                if not names:
                    place = f"{path.relative_to(ROOT).as_posix()}:{name}", frame.f_lineno
                names.append(name)
            frame = frame.f_back
        self.recorded.append(Wait(kind, *place, frozenset(names), idle))
        until = self.queued if until is None else until
        self._arrive(lambda queued, target: queued <= until)

    def _arrive(self, has_come):
        for copy in [copy for copy in self._leaving if has_come(*copy[:2])]:
            copy[1].copy_(copy[2])
            self._leaving.remove(copy)

    # ---- memory of the host ----

    def pin(self, tensor):
        """Let a tensor's memory be pinned; it is kept, so that no other gets its address."""
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    def is_pinned(self, tensor):
        """Whether a tensor's memory is pinned."""
        return tensor.untyped_storage().data_ptr() in self._pinned

    def register(self, address, nbytes, flags):
        """Pin memory that is somebody else's, as CUDA's cudaHostRegister does."""
        self._pinned[address] = None
        return 0

    def unregister(self, address):
        """Undo that."""
        del self._pinned[address]


def _on_host(value):
    if isinstance(value, CardTensor):
        return value.numbers
    return torch.device("cpu") if isinstance(value, torch.device) and value == CARD else value
