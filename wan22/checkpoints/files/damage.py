"""Errors that name their file, where a library beneath reads it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...checks import cut


@contextmanager
def errors_named(source: Any) -> Iterator[None]:
    """Let what other libraries raise on a damaged file or folder be one line that names it.

    An OSError or ImportError stays one, anything else becomes a ValueError. Errors that name the source in
    one line, as wan22's own do, and those of memory pass as they are.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # tokenizers and safetensors have classes that derive from nothing else
        text, known = str(error), isinstance(error, OSError | ValueError | ImportError)
        if type(error).__name__ == "OutOfMemoryError" or (known and str(source) in text and "\n" not in text):
            raise
        kind = next((kind for kind in (OSError, ImportError) if isinstance(error, kind)), ValueError)
        told = cut(" ".join(text.split()))
        raise kind(f"{source} cannot be loaded: {type(error).__name__}: {told}") from error
