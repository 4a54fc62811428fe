"""What the parts of a pipeline have in common."""

import weakref
from typing import Any


class Part:
    """A part that a pipeline holds, without keeping it: a deleted pipeline's memory is free at once."""

    def __init__(self, pipe: Any) -> None:
        self._reference = weakref.ref(pipe)

    @property
    def _pipe(self) -> Any:
        pipe = self._reference()
        assert pipe is not None, "the pipeline was deleted"
        return pipe
