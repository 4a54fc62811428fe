"""Repositories of the hub: their names, the options of a download, and folders of the official layout."""

OPTIONS = {"cache_dir", "force_download", "token", "local_files_only", "revision"}
EXPERTS = ("high_noise_model", "low_noise_model")  # their folders in the official layout
TOKENIZERS = ("google/umt5-xxl", "tokenizer")  # its folder in the official layout, and in Diffusers'


def is_repository_name(source: str) -> bool:
    """Return whether something that is no path here can be a repository's name."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~"))


def check_repository_name(source: str, what: str = "folder") -> None:
    """Raise FileNotFoundError for a path that is not here and cannot be a repository's name."""
    if not is_repository_name(source):
        raise FileNotFoundError(f"there is no {what} {source}, and a repository's name is like org/name")
