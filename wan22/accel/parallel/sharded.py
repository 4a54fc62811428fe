"""A model's weights divided among ranks, which gather each block while it computes."""

from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

from ...checkpoints.loading.dtypes import dtypes_in
from ..offload.layout import blocks_of
from ..planning.meta_models import meta_copy
from ..quantization.layers import is_quantized


def check(model: Any) -> None:
    """Refuse a model that is quantised or not on the CPU."""
    name = type(model).__name__
    if is_quantized(model):
        raise ValueError(
            f"fsdp=True cannot divide the quantised weights of {name}; fsdp=False leaves them whole"
        )
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise ValueError(
            f"fsdp=True divides weights on their way from the CPU, and those of {name} have left it; call it "
            "before pipe.to"
        )


def sharded(model: Any, mesh: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a copy of a model on the CPU whose weights fully_shard divides; the model stays as it is.

    Each weight is cut along its first axis; of a mapped one, a rank reads only its part of the file, and
    converts it to `dtype` as loading does. The mesh has one axis. The copy has no gradients.
    """
    check(model)
    part = meta_copy(model, dtypes=dtypes_in(model, dtype), attached=True)
    for block in blocks_of(part):
        fully_shard(block, mesh=mesh)
    fully_shard(part, mesh=mesh, reshard_after_forward=True)
    kind = mesh.device_type
    index = "" if kind == "cpu" else f":{torch.accelerator.current_device_index()}"
    part.to_empty(device=torch.device(f"{kind}{index}"))
    rank, ranks = mesh.get_local_rank(), mesh.size()
    with torch.no_grad():
        for own, whole in zip(part.parameters(), model.parameters(), strict=True):
            pieces = whole.chunk(ranks)
            if rank < len(pieces):
                own.to_local().copy_(pieces[rank])
        for mine, whole in zip(part.buffers(), model.buffers(), strict=True):
            mine.copy_(whole)
    return part
