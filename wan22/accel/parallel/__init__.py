"""One video on many devices, on torch.distributed; what runs there knows nothing of that."""

from .attach import Parallel, parallelize
from .mesh import Layout

__all__ = ["Layout", "Parallel", "parallelize"]
