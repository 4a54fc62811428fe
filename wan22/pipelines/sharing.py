"""A pipeline that is loaded for the memory and the GPUs that there are, several ranks' among them."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ..accel.parallel import parallelize, processes
from ..accel.parallel.environment import launched
from .placement import PlacedPipeline


class SharedPipeline(PlacedPipeline):
    """A pipeline whose work ranks may share."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        memory: str | float | None = None,
        quantize: str | None = None,
        parallel: str | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a pipeline as FilesPipeline.from_pretrained does, for the memory and the GPUs that there are.

        Args:
            pretrained_model_name_or_path: folder, or repository.
            memory: "auto", or what of a GPU's memory may be used, such as "12GB": the fastest way to make the
                checkpoint's videos in it is found (`wan22.accel.plan`) and applied; anew for a larger video.
            quantize: how to quantise the transformers, which changes the result; see `quantize`.
            parallel: "auto": under torchrun all ranks make one video together, each on its own GPU, in the
                layout that moves the least, with divided weights where whole ones would not fit; started as
                one process, it goes to its GPU. Or arguments of `wan22.accel.parallel.parallelize`.
            **kwargs: see FilesPipeline.from_pretrained.

        Returns: the pipeline.

        Raises:
            ValueError: nothing fits, there is no GPU, or `parallel` says something else; said before anything
                is loaded. Or the work cannot be shared as asked.
        """
        source = pretrained_model_name_or_path
        if parallel is None:
            return cls.load_to_fit(source, memory, quantize, **kwargs)
        together = arguments_of(parallel)
        if not launched():
            pipe = cls.load_to_fit(source, memory, quantize, **kwargs)
            return pipe if pipe.memory_plan is not None else pipe.to(processes.own_device())
        processes.join()
        processes.keep_silent()
        if memory is None and quantize is None:
            dtype, kwargs = transformers_as_stored(kwargs)
            together = {"dtype": dtype} | together
        pipe = cls.load_to_fit(source, memory, quantize, **kwargs)
        parallelize(pipe, **together)
        return pipe

    def computed_on(self) -> str:
        """Return what computes, for recipes: the device, and the ranks."""
        device = super().computed_on()
        return device if self.parallel is None else f"{device}, {self.parallel}"


def arguments_of(parallel: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `parallelize` that from_pretrained's parallel stands for.

    Raises:
        ValueError: it is neither "auto" nor some of them.
    """
    if parallel == "auto":
        return {}
    known = list(inspect.signature(parallelize).parameters)[1:]
    if not isinstance(parallel, Mapping) or (set(parallel) - set(known)):
        raise ValueError(f"parallel={parallel!r} must be 'auto', or a dict with some of {', '.join(known)}")
    return dict(parallel)


def transformers_as_stored(options: dict[str, Any]) -> tuple[torch.dtype | None, dict[str, Any]]:
    """Let transformers be loaded as they are stored, mapped from their files, to be converted by parts.

    Args:
        options: of from_pretrained.

    Returns: the dtype that they are to have, None if that is the stored one; the options without it.
    """
    asked = options.get("dtype") or options.get("torch_dtype")
    by_name = dict(asked) if isinstance(asked, Mapping) else {"default": asked}
    slots = ("transformer", "transformer_2")
    wanted = {by_name.get(slot, by_name.get("default")) for slot in slots}
    if len(wanted) > 1 or None in wanted:  # each its own: as on one rank
        return None, options
    rest = {name: value for name, value in options.items() if name != "torch_dtype"}
    return wanted.pop(), rest | {"dtype": {**by_name, **dict.fromkeys(slots)}}
