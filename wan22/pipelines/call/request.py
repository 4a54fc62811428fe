"""A call's arguments as they were given, and as a recipe holds them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from os import PathLike
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from ...checks import cut, shown, unknown_argument, with_plain_numbers
from ...few_steps import FewSteps
from ...video.recipe import IMAGES, Recipe
from ...video.schema import check_extent
from ...web import masked
from .images import Picture

Prompt = str | Sequence[str] | None
P = ParamSpec("P")
Result = TypeVar("Result")
Generators = torch.Generator | Sequence[torch.Generator] | None

# Arguments that leave the video as it is, or that no recipe can hold.
NOT_RECORDED = {
    *("output_type", "return_dict", "preview", "preview_every", "preview_decoder"),
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs"),
    *("generator", "latents", "prompt_embeds", "negative_prompt_embeds", "image_embeds"),
}

_SAVED_WITHOUT = "it was saved without, or embeddings took its place"
_MAY_LACK = {"prompt": _SAVED_WITHOUT, "negative_prompt": _SAVED_WITHOUT, "seed": "the noise was given"}


class Request:
    """A call's arguments, as attributes; made of the locals() of `__call__`."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = {n: with_plain_numbers(value) for n, value in arguments.items() if n != "self"}

    def __getattr__(self, name: str) -> Any:
        if name == "arguments" or name not in self.arguments:
            raise AttributeError(f"this call has no argument {shown(name)}")
        return self.arguments[name]

    @classmethod
    def of(cls, call: Callable[..., Any], arguments: Mapping[str, Any]) -> "Request":
        """Return the request of a call with some of its arguments, the others being its defaults."""
        parameters = inspect.signature(call).parameters
        return cls({name: arguments.get(name, p.default) for name, p in parameters.items()})

    def changed(self, **changes: Any) -> "Request":
        """Return a request with other values."""
        return Request(self.arguments | changes)

    def recorded(self) -> dict[str, Any]:
        """Return the arguments that a recipe holds, as plain values; None for those that were not given."""
        return {
            name: None if value == [] else value
            for name, value in ((n, plain(v)) for n, v in self.arguments.items() if n not in NOT_RECORDED)
        }

    def image_marks(self) -> dict[str, tuple[str, ...]]:
        """Return the fingerprints of the pictures, which are read already, by argument."""
        given = {name: self.arguments.get(name) for name in IMAGES}
        return {n: tuple(picture.mark for picture in pictures) for n, pictures in given.items() if pictures}

    def tensors(self) -> list[str]:
        """Return the names of the tensors among NOT_RECORDED that were given."""
        return [
            name for name in self.arguments if name in NOT_RECORDED and torch.is_tensor(getattr(self, name))
        ]


def with_known_arguments(call: Callable[P, Result]) -> Callable[P, Result]:
    """Let a call refuse an argument that it does not have, by a TypeError with the nearest that it has."""
    known = [name for name in inspect.signature(call).parameters if name != "self"]

    @wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Result:
        if unknown := kwargs.keys() - known:
            raise TypeError(unknown_argument("the call", sorted(unknown)[0], known))
        return call(*args, **kwargs)

    return checked


def check_recorded(recipe: Recipe, call: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse a recipe's arguments that a call cannot take from it, unless others are given in their place.

    Raises: ValueError: an argument is none that recipes hold, a prompt or a seed is not in the recipe, an
        image was in memory, or is named by a recipe that was read, or the call would grow without end.
    """
    allowed = inspect.signature(call).parameters.keys() - NOT_RECORDED
    if unknown := sorted(recipe.call.keys() - allowed):
        raise ValueError(f"the recipe's {shown(unknown[0])} is no argument that this pipeline takes")
    for name in IMAGES:
        images = None if name in given else recipe.call.get(name)
        listed = images if isinstance(images, list | tuple) else [images]
        if images is not None and None in listed:
            raise ValueError(f"the recipe's {name} was in memory; give {name}=")
        if images is not None and recipe.outside:
            named = cut(", ".join(masked(str(image)) for image in listed))
            raise ValueError(f"the recipe names {name} {named}, which is not opened unasked; give {name}=")
    for name, why in _MAY_LACK.items():
        values = recipe.call.get(name)
        if isinstance(values, list | tuple) and None in values and name not in given:
            raise ValueError(f"the recipe has no {name}: {why}; give {name}=")
    check_extent(recipe, given)


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: numbers, text, lists and dicts."""
    if isinstance(value, FewSteps):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(inner) for inner in value]
    return value.name if isinstance(value, Picture) else value
