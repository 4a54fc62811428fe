"""Every random number of a video: its own generator's, drawn on the CPU unless asked otherwise.

Shapes: b videos, c latent channels, t h w latent frames, rows, columns.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from ...checks import check_positive_int, shown
from .checks import describe
from .request import Generators, Request


def generators_of(request: Request, count: int, draw_seed: Callable[[], int]) -> list[torch.Generator]:
    """Return one generator for each of `count` videos; a single seed s gives the videos s, s + 1, …"""
    if request.generator is None:
        return _seeded(draw_seed() if request.seed is None else request.seed, request.noise_device, count)
    if request.seed is not None:
        raise ValueError("seed and generator are both given; give one")
    if request.noise_device is not None:
        raise ValueError("noise_device and generator are both given; a generator draws on its own device")
    given = request.generator
    generators = list(given) if isinstance(given, Sequence) else [given] * count
    for generator in generators:
        if not isinstance(generator, torch.Generator):
            raise ValueError(
                f"generator must be a torch.Generator, or one per video, not {describe(generator)}"
            )
    if len(generators) != count:
        raise ValueError(f"{len(generators)} generators for {count} videos; give {count}, or one")
    return generators


def _seeded(seed: Any, device: str | None, count: int) -> list[torch.Generator]:
    seed = seed.tolist() if isinstance(seed, np.ndarray | torch.Tensor) else seed
    alone = not isinstance(seed, Sequence) or isinstance(seed, str)
    given = [
        check_positive_int("seed", value, least=0, most=2**63 - 1) for value in ([seed] if alone else seed)
    ]
    seeds = [given[0] + i for i in range(count)] if alone else given
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} videos; give {count}, or one")
    try:
        return [torch.Generator(device or "cpu").manual_seed(value) for value in seeds]
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"noise_device={shown(device)} is not there to draw on; 'cpu' always is") from error


def seeds_of(request: Request, generators: Sequence[torch.Generator]) -> list[int | None]:
    """Return each video's seed; None where no seed gives its noise again."""
    if request.latents is not None:
        return [None] * len(generators)
    shared = isinstance(request.generator, torch.Generator)
    return [None if shared and i else g.initial_seed() for i, g in enumerate(generators)]


def not_reproducible_because(
    request: Request, generators: Sequence[torch.Generator], guided: bool
) -> str | None:
    """Return why a call's recipe is not enough to make its videos again; None if it is."""
    for name in request.tensors():
        if guided or name != "negative_prompt_embeds":
            return f"{name} were given"
    if isinstance(request.generator, torch.Generator) and len(generators) > 1:
        return "the videos' noise was drawn from one generator"
    if request.generator is not None:
        for g in generators:
            fresh = torch.Generator(g.device).manual_seed(g.initial_seed())
            if not torch.equal(g.get_state(), fresh.get_state()):
                return "the generator had been drawn from before"
    return None if request.callback_on_step_end is None else "callback_on_step_end took part"


def starting_noise(
    count: int,
    shape: Sequence[int],
    generator: Generators,
    draw_seed: Callable[[], int],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Return noise for a loop of the caller's own, `count` and then the shape, as a call draws it."""
    request = Request({"generator": generator, "seed": None, "noise_device": None})
    return draw(generators_of(request, count, draw_seed), shape, device).to(dtype or torch.float32)


def draw(
    generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device | str | None
) -> torch.Tensor:
    """Return standard normal noise, "b" and then the shape, float32; each video's from its own generator.

    Videos that share a generator are drawn at once, as in diffusers: on a GPU it matters.
    """
    first = generators[0]
    if len(generators) > 1 and all(generator is first for generator in generators):
        size = len(generators), *shape
        return torch.randn(size, generator=first, device=first.device, dtype=torch.float32).to(device)
    drawn = [torch.randn(tuple(shape), generator=g, device=g.device, dtype=torch.float32) for g in generators]
    return torch.stack([noise.to(device) for noise in drawn])


class NoisePerVideo(TorchFunctionMode):
    """Draws a batch's normal noise from the videos' own generators while a solver's step runs.

    Stochastic solvers of diffusers draw by torch.randn_like or torch.randn, from the global generator: a seed
    would not mean one video, and a video would depend on its neighbours in the batch.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.generators = generators

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn_like:
            like = args[0]
            shape, dtype, device = like.shape, kwargs.get("dtype") or like.dtype, like.device
        elif func is torch.randn and kwargs.get("generator") is None:
            shape = torch.Size(args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
            dtype, device = kwargs.get("dtype") or torch.get_default_dtype(), kwargs.get("device")
        else:
            return func(*args, **kwargs)
        if not shape or shape[0] != len(self.generators):
            raise ValueError(
                f"the scheduler draws noise of shape {tuple(shape)} for {len(self.generators)} videos; it "
                "must be each video's own, or a seed would not mean one video"
            )
        return draw(self.generators, shape[1:], device).to(dtype)
