"""Tensors on the pretended card, and what PyTorch does to tensors before an operator sees them."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CARD = torch.device("cuda:0")
active = []  # the card, while there is one


def current():
    """Return the card."""
    assert active, "a tensor of a card that is gone"
    return active[0]


class CardTensor(Tensor):
    """A tensor on the card; `numbers` is a CPU tensor with its values."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, real):
        outer = torch.Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=CARD,
        )
        outer.numbers = real
        return outer

    def __init__(self, real):
        """Nothing is left to do."""

    def __repr__(self, **kwargs):
        return f"CardTensor({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return current().run(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        special = _SPECIAL.get(func)
        if special is not None:
            return special(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # results on the host stay of their own class
            return func(*args, **(kwargs or {}))


def on_card(real):
    """Return a CPU tensor's memory as a tensor on the card."""
    return CardTensor(real)


def unwrapped(value):
    """Return the CPU tensors inside of whatever holds tensors on the card."""
    return tree_map_only(CardTensor, lambda tensor: tensor.numbers, value)


# ---- what does not reach an operator, or chooses kernels by device before it does ----


def _attention(*args, **kwargs):
    args, kwargs = unwrapped(args), unwrapped(kwargs)
    current().queued += 1
    return on_card(torch.nn.functional.scaled_dot_product_attention(*args, **kwargs))


_DATA = torch._C.TensorBase.data


def get_data(owner):
    """Return a tensor's memory as a new tensor."""
    return on_card(owner.numbers) if isinstance(owner, CardTensor) else _DATA.__get__(owner)


def set_data(owner, value):
    """Give a parameter or tensor the memory of another one, whatever device each is on."""
    if not isinstance(owner, CardTensor) and not isinstance(value, CardTensor):
        return _DATA.__set__(owner, value)
    new = on_card(value.numbers) if isinstance(value, CardTensor) else value.detach()
    if isinstance(owner, torch.nn.Parameter):
        new = torch.nn.Parameter(new, owner.requires_grad)
    kept = {name: value for name, value in vars(owner).items() if name not in ("numbers", "_is_param")}
    owner.__class__ = type(new)
    torch._C._swap_tensor_impl(owner, new)
    vars(owner).clear()
    vars(owner).update(kept | vars(new))


def _set(target, source, start=0, shape=None, stride=None):
    """Return a tensor in a storage."""
    real = torch.empty(0, dtype=target.dtype)
    if shape is None:
        return on_card(real.set_(unwrapped(source)))
    return on_card(real.set_(source, start, shape, stride))


def _contiguous(tensor, memory_format=torch.contiguous_format):
    is_so = tensor.numbers.is_contiguous(memory_format=memory_format)
    return tensor if is_so else tensor.clone(memory_format=memory_format)


def _new_tensor(tensor, data, dtype=None, device=None):
    made = torch.tensor(data, dtype=dtype or tensor.dtype)
    return made if device is not None and torch.device(device).type == "cpu" else made.to(CARD)


def _getitem(tensor, index):
    _record_index(index)
    return on_card(unwrapped(tensor)[unwrapped(index)])


def _setitem(tensor, index, value):
    _record_index(index)
    if isinstance(value, Tensor) and not isinstance(value, CardTensor) and value.ndim:
        current().upload(value)
    if not isinstance(tensor, CardTensor):
        current().read("download")
    unwrapped(tensor)[unwrapped(index)] = unwrapped(value)


def _record_index(index):
    for each in index if isinstance(index, tuple | list) else (index,):
        if isinstance(each, Tensor):
            current().record_index(each)


def _copy(target, source, non_blocking=False):
    return current().run(torch.ops.aten.copy_.default, (target, source, non_blocking), {})


def _reading(kind, function):
    """Return a function that makes the host wait, and which a guard of devices keeps from the operators."""

    def read(*args, **kwargs):
        current().read(kind)
        found = function(*unwrapped(args), **unwrapped(kwargs))
        return tree_map_only(Tensor, on_card, found)

    return read


_NUMBERS = (Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__)
_COUNTS = (Tensor.nonzero, torch.nonzero, torch.argwhere)
_SPECIAL = {
    **{function: _reading("reads a number", function) for function in _NUMBERS},
    **{function: _reading("counts", function) for function in _COUNTS},
    Tensor.tolist: _reading("reads numbers", Tensor.tolist),
    Tensor.copy_: _copy,
    Tensor.__getitem__: _getitem,
    Tensor.__setitem__: _setitem,
    torch.nn.functional.scaled_dot_product_attention: _attention,
    Tensor.contiguous: _contiguous,
    Tensor.new_tensor: _new_tensor,
    Tensor.data_ptr: lambda tensor: tensor.numbers.data_ptr(),
    Tensor.untyped_storage: lambda tensor: tensor.numbers.untyped_storage(),
    Tensor.set_: _set,
    Tensor.is_pinned: lambda tensor, *_: False,
    Tensor.record_stream: lambda tensor, stream: None,
}


class Devices(TorchFunctionMode):
    """Names the card in full, and makes what PyTorch would make on the card itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        args = tuple(_indexed(arg) if isinstance(arg, str | torch.device) else arg for arg in args)
        if "device" in kwargs:
            kwargs["device"] = _indexed(kwargs["device"])
        pinned = kwargs.get("pin_memory")
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == CARD:
            return func(*args, **{**kwargs, "device": None}).to(CARD)
        if pinned:
            kwargs["pin_memory"] = False
            return current().pin(func(*args, **kwargs))
        if func is Tensor.pin_memory:
            return current().pin(args[0].clone())
        if func is Tensor.is_pinned and not isinstance(args[0], CardTensor):
            return current().is_pinned(args[0])
        return func(*args, **kwargs)


def _indexed(device):
    if isinstance(device, str) and device.partition(":")[0] != "cuda":
        return device
    if device is not None and torch.device(device).type == "cuda":
        return CARD
    return device


class Operators(TorchDispatchMode):
    """Sees the operators that make tensors on the card out of nothing, or of the host's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return current().run(func, args, kwargs or {})
