"""Values that no trained model has, told from a sample of its weights."""

import logging

import torch

from ...checks import cut
from ..files.nvfp4 import Nvfp4, has_finite_scales
from ..files.quantized import QuantizedTensor, ScaledNumbers
from ..naming.dialects import Tensors

logger = logging.getLogger(__name__)

# Values of a weight that are read: all of norms, biases and modulation; of a matrix, one page of its file.
_SAMPLE, _WHOLE = 256, 2**14


def check_samples(source: str, tensors: Tensors) -> None:
    """Refuse weights whose first values are not all finite; warn of a model whose matrices are zero."""
    for name, tensor in tensors.items():
        four_bits = isinstance(tensor, QuantizedTensor) and isinstance(tensor.format, Nvfp4)
        if four_bits and not tensor.is_meta and not has_finite_scales(tensor):  # type: ignore[arg-type]
            raise ValueError(f"{source}: {cut(name)} has scales that are not finite")
    samples = {name: sample for name, tensor in tensors.items() if (sample := _sample(tensor)) is not None}
    if not samples:
        return
    # One sum tells in a tenth of the time; large values that are finite may make one that is not.
    if not torch.cat(list(samples.values())).sum(dtype=torch.float32).isfinite():
        wrong = [name for name, sample in samples.items() if not sample.isfinite().all()]
        if wrong:
            raise ValueError(f"{source}: {cut(wrong[0])} has values that are not finite")
    matrices = [sample for name, sample in samples.items() if len(tensors[name].shape) > 1]
    if len(matrices) > 1 and not torch.cat(matrices).any():
        logger.warning("%s: all of its matrices begin with zeros; these are no trained weights", source)


def _sample(tensor: torch.Tensor | QuantizedTensor) -> torch.Tensor | None:
    """Return the first values of a weight in memory or in a file; those in float8 as float32."""
    if isinstance(tensor, QuantizedTensor):
        if not isinstance(tensor.format, ScaledNumbers) or tensor.is_meta:
            return None  # what is in blocks or tiles is only read as a whole
        tensor = tensor.parts["data"].view(tensor.format.kind)
    if type(tensor) is not torch.Tensor or not tensor.is_cpu or not tensor.is_contiguous():
        return None
    flat = tensor.view(-1)
    sample = flat if flat.numel() <= _WHOLE else flat[:_SAMPLE]
    return sample.float() if sample.element_size() == 1 else sample
