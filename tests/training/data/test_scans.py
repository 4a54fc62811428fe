"""Files are decoded and hashed again only where they have changed."""

import hashlib
import json
import os

import pytest

from tests.videos import frames_of, lossless
from wan22.training.data import scans
from wan22.training.data.scans import FILE, Scans


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded."""
    names, scan = [], scans.scan
    monkeypatch.setattr(scans, "scan", lambda path: names.append(path.name) or scan(path))
    return names


def test_a_file_is_decoded_once(tmp_path, decoded):
    path = lossless(tmp_path / "a.mkv", frames_of(5))
    found = Scans()
    video, mark = found.video(path), found.sha256(path)
    assert found.video(path) == video and decoded == ["a.mkv"]
    assert mark == hashlib.sha256(path.read_bytes()).hexdigest()
    found.save(tmp_path)
    assert str(tmp_path) not in (tmp_path / FILE).read_text()
    again = Scans(tmp_path)
    assert again.video(path) == video and again.sha256(path) == mark and decoded == ["a.mkv"]
    lossless(path, frames_of(7))
    changed = Scans(tmp_path)
    assert len(changed.video(path).times) == 7 and changed.sha256(path) != mark
    os.utime(path, ns=(1, 1))
    assert len(Scans(tmp_path).video(path).times) == 7
    with pytest.raises(FileNotFoundError):
        again.sha256(tmp_path / "b.mkv")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "wan22.scans.1", "files": {}}', "[" * 10**5])
def test_a_list_that_is_damaged_is_made_again(text, tmp_path, decoded):
    (tmp_path / FILE).write_text(text)
    assert len(Scans(tmp_path).video(lossless(tmp_path / "a.mkv", frames_of(5))).times) == 5


@pytest.mark.parametrize("video", [None, [1], [64, 48, "x", 1], [64, 48, [0], 0], [10**6, 10**6, [0], 1], {}])
def test_an_entry_that_is_damaged_is_made_again(video, tmp_path, decoded):
    path = lossless(tmp_path / "a.mkv", frames_of(5))
    found = Scans()
    found.video(path)
    found.save(tmp_path)
    read = json.loads((tmp_path / FILE).read_text())
    for entry in read["files"].values():
        entry |= {"video": video, "sha256": 3}
    (tmp_path / FILE).write_text(json.dumps(read))
    again = Scans(tmp_path)
    assert again.video(path) == found.video(path) and again.sha256(path) == found.sha256(path)
    assert decoded == ["a.mkv", "a.mkv"]
