"""Room for what is written, and what PyTorch's format needs."""

import errno
import os
import shutil

import pytest
import torch

from tests.checkpoints.converting.small_results import EVENTS, FORMS, tensors, tree, write
from wan22.checkpoints.converting import unfinished, writing


@pytest.mark.parametrize("form", FORMS)
def test_room_is_asked_for_before_anything_is_there(form, work, monkeypatch):
    usage = shutil.disk_usage("/")
    plans, place = work
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    need = {"folder": 5 * 4000 + 8000 + 8 + 200 + 5, "single": 8000}[form]
    index = sum(len(text) for name, text in plans[form].texts.items() if "index" in name)
    with pytest.raises(
        OSError, match=rf"needs {(need + index) / 1e9:.3g} GB more, but its disk has 1e-07 GB left"
    ):
        write((plans, place / "deep/er"), form)
    assert not list(place.iterdir())


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EFBIG"])
@pytest.mark.parametrize("event", ["write_text", "copyfile", "write_safetensors", "save", "write", "mkdir"])
def test_the_disk_fills_up(event, code, work, expected, monkeypatch):
    owner, number = next((o, getattr(errno, code)) for o, n in EVENTS if n == event)
    names = {
        "write_text": "vae/model.safetensors.index.json",
        "copyfile": "tokenizer/more/notes.txt",
        "save": "t5.pth",
    }
    names |= {"write_safetensors": "vae/model-00001-of-00003.safetensors", "write": ".journal"}

    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(owner, event, full)
        with pytest.raises(
            OSError, match=r"out\.partial: .*, (2\.8|1\.6)e-05 GB are not written yet; "
        ) as error:
            write(work, "folder")
    assert error.value.errno == number and "make room, and the same command goes on with" in str(error.value)
    assert names.get(event, "out.partial") in str(error.value) and "\n" not in str(error.value)
    if event in ("write", "mkdir"):
        assert not list(work[1].iterdir())
    write(work, "folder")
    assert tree(work[1]) == expected["folder"]


def test_the_disk_fills_up_at_the_last_line_of_the_journal(work, expected, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "sync_tree", lambda folder: patch.setattr(os, "write", full))
        with pytest.raises(OSError, match=r"No space left on device: '.*out\.partial\.journal'"):
            write(work, "folder")
    assert not (work[1] / "out").exists()
    write(work, "folder")
    assert tree(work[1]) == expected["folder"]


def test_what_pytorch_does_not_say(tmp_path, monkeypatch):
    """Its error of a file that cannot grow is a RuntimeError."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(writing, "load_file", lambda path: {f"t{i}": torch.ones(10**5) for i in range(2)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, before[1]))
    try:
        with pytest.raises(OSError) as error:
            writing._write_pth(tmp_path / "t5.pth", tuple(tensors(2)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["t5.pth"]


def test_a_pth_does_not_depend_on_the_name_it_is_written_under(tmp_path):
    for name in ("a.pth", ".wan22-0123456789abcdef.pth"):
        writing._write_pth(tmp_path / name, tuple(tensors(2)))
    one, other = (path.read_bytes() for path in tmp_path.iterdir())
    assert one == other


def test_a_link_round_in_a_circle(work):
    (work[0]["folder"].copies["tokenizer"] / "more/round").symlink_to("..")
    with pytest.raises(ValueError, match="more/round is a link to a folder that it lies in; remove the link"):
        write(work, "folder")
    assert not list(work[1].iterdir())
