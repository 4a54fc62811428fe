"""What tells a repository of the hub from a path, and the options of a download."""

OPTIONS = {"cache_dir", "force_download", "token", "local_files_only", "revision"}


def is_repository_name(source: str) -> bool:
    """Return whether something that is no path here can be a repository's name."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def check_repository_name(source: str, what: str = "folder") -> None:
    """Refuse a path that is not there.

    Raises:
        FileNotFoundError: it cannot be a repository's name either.
    """
    if not is_repository_name(source):
        raise FileNotFoundError(f"there is no {what} {source}, and a repository's name is like org/name")
