"""What a recipe that leaves this machine does not say: the folders of files, and parts of addresses."""

import re
from pathlib import PureWindowsPath
from urllib.parse import unquote, urlsplit, urlunsplit

from ..pictures import is_url

# A file in the hub's cache, whose folders name its repository.
_CACHED = re.compile(r".*[/\\]models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\][^/\\]+([/\\].*)?")


def without_folders(place: str) -> str:
    """Return what names a file, folder, repository or URL elsewhere, too, without what is private.

    Of an absolute path, and of one from the home folder or through a parent folder, that is its last part;
    of one in the hub's cache the repository and its file. A URL loses its user, password, query and fragment.
    Relative paths and repositories stay.
    """
    if is_url(place):
        try:
            url = urlsplit(place)
        except ValueError:  # brackets that hold no address
            return "a URL"
        return urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))
    if place[:5].lower() == "file:":
        place = "/" + unquote(place[5:])
    if cached := _CACHED.fullmatch(place):
        owner, name, file = cached.groups("")
        return f"{owner}/{name}{file}".replace("\\", "/")
    path = PureWindowsPath(place)  # whose separators are both systems'
    private = place[:1] in ("/", "\\", "~") or bool(path.drive) or ".." in path.parts
    return (path.name or "a folder") if private else place
