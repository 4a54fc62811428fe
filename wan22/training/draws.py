"""Random numbers that depend on a seed and a sample's number alone.

No generator has a state to keep: a resumed run, and one that is shared among processes, draws what an
uninterrupted run of one process draws.
"""

import hashlib

import torch


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Return a generator on the CPU for one purpose and one sample."""
    text = " ".join((str(seed), purpose, *map(str, numbers)))
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)  # 63 bits


def uniform(seed: int, purpose: str, *numbers: int) -> float:
    """Return a number in [0, 1)."""
    return torch.rand((), generator=generator(seed, purpose, *numbers), dtype=torch.float64).item()


def permuted(count: int, seed: int, purpose: str, *numbers: int) -> list[int]:
    """Return the numbers below a count in random order."""
    order: list[int] = torch.randperm(count, generator=generator(seed, purpose, *numbers)).tolist()
    return order


def noise_like(x: torch.Tensor, seed: int, purpose: str, *numbers: int) -> torch.Tensor:
    """Return standard normal noise of a tensor's shape, float32 on the CPU."""
    return torch.randn(x.shape, generator=generator(seed, purpose, *numbers))
