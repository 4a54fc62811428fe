"""Downloads from the Hugging Face hub: their options, and in one line why one fails."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .checks import cut

logger = logging.getLogger(__name__)

OPTIONS = {"cache_dir", "force_download", "token", "local_files_only", "revision"}
_HUB_LOG = "huggingface_hub.utils._http"  # where the hub's library tells of each attempt, in two lines


@contextmanager
def reaching(repository: str, file: str = "", options: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Let a download that fails within say why, in one line.

    Args:
        repository: name of the repository, or what the caller takes for one.
        file: what is wanted of it, if that is one file.
        options: those of the download, some of OPTIONS.

    Raises: FileNotFoundError: the repository or the file is not there, or neither in the cache nor reached.
    """
    from huggingface_hub import errors

    attempts = _FirstAttempt(repository)
    hub = logging.getLogger(_HUB_LOG)
    hub.addFilter(attempts)
    try:
        yield
    except (OSError, ValueError, errors.HTTPError) as error:
        raise FileNotFoundError(_why(error, repository, file, options or {})) from error
    finally:
        hub.removeFilter(attempts)


class _FirstAttempt(logging.Filter):
    """Replaces the lines about attempts that fail by one about the first of them."""

    def __init__(self, repository: str) -> None:
        super().__init__()
        self._repository, self._told = repository, False

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "thrown while requesting" not in message and "Retrying in" not in message:
            return True
        if not self._told:
            self._told = True
            logger.warning(
                "%s: the hub does not answer; it is asked again for half a minute", cut(self._repository)
            )
        return False


def _why(error: BaseException, repository: str, file: str, options: Mapping[str, Any]) -> str:
    from huggingface_hub import constants, errors

    name, revision = cut(repository), options.get("revision")
    at = f" at revision {cut(revision)}" if revision else ""
    what = f"{name}/{cut(file)}" if file else name
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, errors.HFValidationError):
            return f"there is no file or folder {name}, and a repository's name is like org/name"
        if isinstance(cause, errors.GatedRepoError):
            return f"{name} is gated: ask for access on its page, and log in with `hf auth login`"
        if isinstance(cause, errors.RepositoryNotFoundError):
            return f"the hub has no repository {name} that is public, or that this token may read"
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"{name} has no revision {cut(revision)}"
        if isinstance(cause, errors.RemoteEntryNotFoundError):
            return f"{name} has no file {cut(file)}{at}"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return f"{what} cannot be downloaded: {cut(error)}"  # a full disk, say
    absent = f"{what}{at} is not in the cache"
    advice = "; `wan22 models` lists those that need no download"
    if options.get("local_files_only"):
        return f"{absent}, and local_files_only=True forbids to ask the hub"
    if constants.HF_HUB_OFFLINE:
        return f"{absent}, and HF_HUB_OFFLINE=1 forbids to ask the hub{advice}"
    # The first cause says it best; some of those between have no text.
    lines = (line for cause in reversed(causes) for line in str(cause).splitlines() if line)
    reason = next(lines, type(error).__name__)
    return f"{absent}, and the hub cannot be reached: {cut(reason)}{advice}"
