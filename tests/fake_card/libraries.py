"""What PyTorch answers about the pretended card: its memory, streams and events."""

from types import SimpleNamespace

import torch
from torch import Tensor

from .tensors import CARD, current, get_data, set_data


class Event:
    """A point in the order of what was queued."""

    def __init__(self, *args, **kwargs):
        self.queued = current().queued

    def record(self, stream=None):
        """Move the event to here."""
        self.queued = current().queued

    def synchronize(self):
        """Let the host wait for what was queued before."""
        card = current()
        card.read("event", idle=card.queued == self.queued, until=self.queued)

    def wait(self, stream=None):
        """Let a stream wait; the host does not."""

    def query(self):
        """Whether the host has waited for it."""
        return False


class Stream:
    """The order of what was queued; all streams of the card are one."""

    device = CARD

    def __init__(self, *args, **kwargs):
        pass

    def record_event(self, event=None):
        """Return the present point."""
        return Event()

    def wait_event(self, event):
        """Let the stream wait; the host does not."""

    def synchronize(self):
        """Let the host wait."""
        current().read("stream")

    wait_stream = wait_event

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None


class _AnyGenerator(type(torch.Generator)):
    """Takes generators that were made before there was a card for generators, too."""

    def __instancecheck__(cls, value):
        return isinstance(value, _Generator)


_Generator = torch.Generator


class Generator(_Generator, metaclass=_AnyGenerator):
    """A generator of the CPU's numbers, also on the card, whose own would be others."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.place = CARD if torch.device(device).type == "cuda" else torch.device(device)
        return made

    def __init__(self, device="cpu"):
        """Nothing is left to do."""

    @property
    def device(self):
        """Its device."""
        return self.place


def answers(card):
    """Return the functions that PyTorch answers questions about the card by."""

    def nothing(*args, **kwargs):
        return None

    properties = SimpleNamespace(
        name="a fake card",
        total_memory=card.memory,
        major=card.capability[0],
        minor=card.capability[1],
        multi_processor_count=1,
    )
    cudart = SimpleNamespace(cudaHostRegister=card.register, cudaHostUnregister=card.unregister)
    shared = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: card.read("device"),
        "empty_cache": nothing,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "current_stream": lambda device=None: Stream(),
        "set_stream": nothing,
    }
    cuda = {
        "_lazy_init": nothing,
        "current_device": lambda: 0,
        "set_device": nothing,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: card.capability,
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (card.memory, card.memory),
        "stream": lambda stream: stream or Stream(),
        "device": lambda device: Stream(),
        "Stream": Stream,
        "Event": Event,
        "cudart": lambda: cudart,
    }
    accelerator = {
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_device_index": lambda: 0,
        "set_device_index": nothing,
        "get_memory_info": lambda device=None: (card.memory, card.memory),
    }
    return {
        Tensor: {"data": property(get_data, set_data)},
        torch.cuda: shared | cuda,
        torch.accelerator: shared | accelerator,
        torch: {"Stream": Stream, "Event": Event, "Generator": Generator},
    }
