"""What the parts of a pipeline have in common."""

import copy
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on


class Part:
    """A part that a pipeline holds, without keeping it: a deleted pipeline's memory is free at once."""

    def __init__(self, pipe: Any) -> None:
        self._reference = weakref.ref(pipe)

    @property
    def _pipe(self) -> Any:
        pipe = self._reference()
        assert pipe is not None, "the pipeline was deleted"
        return pipe

    def held_by(self, pipe: Any) -> "Self":
        """Return this part for a copy of the pipeline."""
        part = copy.copy(self)
        part._reference = weakref.ref(pipe)
        return part

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_reference"}
