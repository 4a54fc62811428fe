"""What earlier runs found out about files: a run that goes on does not decode and hash them all again."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ...video.reading import MOST_PIXELS, VideoFile, scan
from ...whole_files import whole_file

FILE = "scans.json"
_FORMAT = "wan22.scans.1"


class Scans:
    """Decodes and hashes each file once, as long as its size and its time of change stay the same.

    Args:
        folder: the folder of encoded clips, whose scans.json has what was found before; None: nothing has.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._known: dict[str, dict[str, Any]] = {}
        if folder is not None:
            try:
                read = json.loads((folder / FILE).read_text(encoding="utf-8"))
                self._known = read["files"] if read["format"] == _FORMAT else {}
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                pass  # not there, or damaged: all is found out again

    def video(self, path: Path) -> VideoFile:
        """Return a video's frames and their times; see `wan22.video.reading.scan`."""
        entry = self._entry(path)
        try:
            return _video(path, *entry["video"])
        except (KeyError, ValueError, TypeError):
            video = scan(path)
            entry["video"] = [video.width, video.height, list(video.times), video.duration]
            return video

    def sha256(self, path: Path) -> str:
        """Return the hash of a file's bytes."""
        entry = self._entry(path)
        if not isinstance(entry.get("sha256"), str):
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
            entry["sha256"] = digest.hexdigest()
        return entry["sha256"]

    def save(self, folder: Path) -> None:
        """Write what is known; it names no folders of this machine."""
        with whole_file(folder / FILE) as temporary:
            temporary.write_text(json.dumps({"format": _FORMAT, "files": self._known}), encoding="utf-8")

    def _entry(self, path: Path) -> dict[str, Any]:
        """Return what is known of a file as it is now, to be added to; a FileNotFoundError names it."""
        key = hashlib.sha256(str(path.absolute()).encode(errors="surrogateescape")).hexdigest()[:32]
        status = path.stat()
        state = [status.st_size, status.st_mtime_ns]
        entry = self._known.get(key)
        if not isinstance(entry, dict) or entry.get("state") != state:
            entry = self._known[key] = {"state": state}
        return entry


def _video(path: Path, width: Any, height: Any, times: Any, duration: Any) -> VideoFile:
    """Return what an entry says of a video; a ValueError or a TypeError refuses one that is damaged."""
    numbers = [width, height, duration, *times]
    whole = bool(times) and all(type(number) is int for number in numbers)
    if not whole or min(numbers[:3]) < 1 or width * height > MOST_PIXELS:
        raise ValueError("the entry is damaged")
    return VideoFile(path, width, height, tuple(times), duration)
