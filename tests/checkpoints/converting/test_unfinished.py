"""Unfinished results: the same bytes after any interruption, one writer, nothing of others is touched."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.checkpoints.converting.small_results import EVENTS, FORMS, REQUEST, target_of, tree, write
from wan22 import whole_files
from wan22.checkpoints.converting import unfinished as module
from wan22.checkpoints.converting import writing
from wan22.checkpoints.converting.unfinished import Unfinished
from wan22.checkpoints.converting.writing import write_plan


class Killed(BaseException):
    pass


def kill_at(monkeypatch, number):
    """Let nothing happen to files any more from the n-th event on; returns the list of events."""
    seen = []

    def counted(name, function):
        def call(*arguments, **named):
            seen.append(name)
            if len(seen) >= number:
                raise Killed
            return function(*arguments, **named)

        return call

    for owner, name in EVENTS:
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return seen


@pytest.mark.parametrize("form", FORMS)
def test_an_interruption_at_any_event(form, work, expected, monkeypatch):
    place = work[1]
    target = target_of(form, place)
    with monkeypatch.context() as patch:
        count = len(all_events := kill_at(patch, 10**6)) or (write(work, form) or len(all_events))
    assert {"fsync", "link" if form == "single" else "rename"} <= set(all_events)
    for number in range(1, count + 1):
        shutil.rmtree(place)
        place.mkdir()
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            with pytest.raises(Killed):
                write(work, form)
        event = f"before {all_events[number - 1]}, {number} of {count}"
        if target.exists():
            whole = tree(place).items() >= expected[form].items()
            assert whole, event
        if not (target.exists() and not target.with_name(f"{target.name}.partial.journal").exists()):
            write(work, form)
        assert tree(place) == expected[form], event
        assert len(list(place.iterdir())) == 1, event


KILLS = """
import json, os, signal, sys
from pathlib import Path
import torch
from tests.checkpoints.converting.small_results import tree
from wan22.checkpoints.converting.convert import convert
torch.set_num_threads(1)
source, folder = sys.argv[1], Path(sys.argv[2])
EVENTS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")

def run(place, number):
    seen = [0]
    def hook(event, arguments):
        if event in EVENTS and str(place) in str(arguments[:2]):
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
    if (pid := os.fork()) == 0:
        sys.addaudithook(hook)
        try:
            convert(source, place / "out", "official", "bf16", shard_size="2MB")
            (folder / "count").write_text(str(seen[0]))
            os._exit(0)
        except FileExistsError:
            os._exit(3)
        finally:
            os._exit(4)
    return os.waitpid(pid, 0)[1]

(folder / "whole").mkdir()
assert run(folder / "whole", 0) == 0
whole, count, wrong, killed = tree(folder / "whole"), int((folder / "count").read_text()), [], 0
for number in range(1, count + 1, 3):
    place = folder / f"killed-{number}"
    place.mkdir()
    killed += os.WIFSIGNALED(run(place, number))
    if (place / "out").exists() and tree(place / "out") != tree(folder / "whole" / "out"):
        wrong.append(f"{number}: not whole at its name")
    ended = run(place, 0)
    if tree(place) != whole or ended not in (0, 3 << 8):
        wrong.append(f"{number}: ended {ended}, {sorted(tree(place))}")
print(json.dumps([count, killed, wrong]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that it forks")
def test_real_kills(tmp_path):
    source = Path("tests/golden/t5.weights.safetensors")
    command = [sys.executable, "-c", KILLS, str(source), str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    count, killed, wrong = json.loads(process.stdout.splitlines()[-1])
    assert count > 12 and killed >= count // 3 and wrong == []


# ---- a folder that is not as it was left ----


def interrupted(work, form="folder", at="t5.pth"):
    """Leave a result of which all files before one are finished."""
    with pytest.MonkeyPatch.context() as patch:
        write_file = writing._write_file

        def stop(file, path):
            if file.path == at:
                raise KeyboardInterrupt
            write_file(file, path)

        patch.setattr(writing, "_write_file", stop)
        with pytest.raises(KeyboardInterrupt):
            write(work, form)
    target = target_of(form, work[1])
    return target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.partial.journal")


def test_finished_files_stay(work, expected):
    folder, _ = interrupted(work)
    before = {p: p.stat().st_ino for p in (folder / "vae").glob("*.safetensors")}
    assert len(before) == 3
    with Unfinished(work[1] / "out", REQUEST) as unfinished:
        write_plan(work[0]["folder"], unfinished, "")
        assert {p: p.stat().st_ino for p in before} == before
        unfinished.place()
    assert tree(work[1]) == expected["folder"]


def test_a_finished_file_that_somebody_touched_is_written_again(work, expected):
    folder, _ = interrupted(work)
    path = sorted((folder / "vae").glob("*.safetensors"))[1]
    times, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    sorted((folder / "vae").glob("*.safetensors"))[0].unlink()
    write(work, "folder")
    assert tree(work[1]) == expected["folder"]


def test_a_journal_that_is_cut_off_anywhere(work, expected):
    folder, journal = interrupted(work)
    whole, partial = journal.read_bytes(), shutil.copytree(folder, work[1].parent / "kept")
    begun = whole.index(b"\n", whole.index(b"request"))
    for size in (*range(0, len(whole), 11), begun, begun + 1, len(whole) - 1):
        shutil.rmtree(work[1])
        work[1].mkdir()
        shutil.copytree(partial, folder)
        journal.write_bytes(whole[:size] + (b"\0" * 50 if size % 2 else b""))
        if size <= begun:
            with pytest.raises(FileExistsError, match=r"out\.partial(\.journal is no journal| is not known)"):
                write(work, "folder")
            shutil.rmtree(folder)  # as the message advises
            if size % 2:
                journal.unlink(missing_ok=True)
        write(work, "folder")
        assert tree(work[1]) == expected["folder"], size


def test_another_conversion_in_the_folder(work):
    folder, journal = interrupted(work)
    before = tree(work[1])
    with pytest.raises(
        FileExistsError, match=r"out\.partial is what another conversion left, .* another to;"
    ):
        write(work, "folder", {**REQUEST, "to": "official"})
    after = tree(work[1])
    assert before == after
    shutil.rmtree(folder)  # it is deleted, the journal is forgotten
    write(work, "folder", {**REQUEST, "to": "official"})
    assert not journal.exists()


def test_what_is_not_the_conversions_is_named_and_stays(work, tmp_path, expected):
    folder, _ = interrupted(work)
    (folder / "vae/notes").write_text("mine")
    with pytest.raises(FileExistsError, match="vae/notes is no part of the conversion; move it away"):
        write(work, "folder")
    (folder / "vae/notes").rename(tmp_path / "notes")
    (folder / "vae/.wan22-0123456789abcdef.pth.scratch").write_text("what a kill leaves")
    (folder / "vae").rename(tmp_path / "elsewhere")
    (folder / "vae").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="vae is no part of the conversion"):
        write(work, "folder")
    (folder / "vae").unlink()
    (tmp_path / "elsewhere").rename(folder / "vae")
    write(work, "folder")
    assert tree(work[1]) == expected["folder"]


@pytest.mark.parametrize("form", FORMS)
def test_an_unfinished_folder_that_is_a_link(form, work, tmp_path):
    target = target_of(form, work[1])
    (tmp_path / "elsewhere").mkdir()
    target.with_name(f"{target.name}.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="is not known to be an unfinished conversion"):
        write(work, form)
    assert len(list(work[1].iterdir())) == 1 and not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("what", ["a file", "a folder", "a link", "a pipe"])
def test_something_else_under_the_journals_name(what, work):
    place = work[1] / "out.partial.journal"
    make = {"a file": lambda p: p.write_text("diary"), "a folder": Path.mkdir, "a pipe": os.mkfifo}
    make.get(what, lambda p: p.symlink_to("nowhere"))(place)
    with pytest.raises(FileExistsError, match=r"out\.partial\.journal is no journal of an unfinished result"):
        write(work, "folder")
    assert [path.name for path in work[1].iterdir()] == [place.name]


# ---- the name ----


@pytest.mark.parametrize("form", FORMS)
def test_a_name_that_is_taken_meanwhile(form, work, expected, monkeypatch):
    target = target_of(form, work[1])
    with monkeypatch.context() as patch:
        patch.setattr(module, "sync_tree", lambda folder: target.write_text("mine"))
        with pytest.raises(FileExistsError, match="is there already; choose another name, or delete it"):
            write(work, form)
    assert target.read_text() == "mine"
    target.unlink()
    monkeypatch.setattr(writing, "_write_file", None)  # as all is written
    write(work, form)
    assert tree(work[1]) == expected[form]


@pytest.mark.parametrize("form", FORMS)
def test_a_kill_after_the_result_has_its_name(form, work, expected, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "_remove_journal", lambda self: None)
        write(work, form)
    assert tree(work[1]) != expected[form]
    monkeypatch.setattr(writing, "_write_file", None)
    with pytest.raises(FileExistsError, match="is there already"):
        write(work, form, {**REQUEST, "to": "official"})
    write(work, form)
    assert tree(work[1]) == expected[form]
    with pytest.raises(FileExistsError, match="is there already"):
        write(work, form)
    assert tree(work[1]) == expected[form]


def test_a_journal_whose_last_line_is_half_written_goes_on_as_one(work, expected):
    """A kill in the next call finds what that call has recorded."""
    _, journal = interrupted(work)
    journal.write_bytes(journal.read_bytes()[:-7])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unfinished, "_remove_journal", lambda self: None)
        write(work, "folder")
    write(work, "folder")
    assert tree(work[1]) == expected["folder"]


# ---- one writer ----

HOLDER = """
import sys, time
from pathlib import Path
from wan22.checkpoints.converting.unfinished import Unfinished
with Unfinished(Path(sys.argv[1]), {}) as unfinished:
    unfinished.begin()
    print("begun", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(work):
    """A process that writes to the destination."""
    command = [sys.executable, "-c", HOLDER, str(work[1] / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_destination_has_one_writer(work, holder, caplog):
    before = tree(work[1])
    who = rf"process {holder.pid} on {socket.gethostname()}, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
    with pytest.raises(FileExistsError, match=rf"out is being written by {who},; wait for it, or choose"):
        write(work, "folder")
    assert tree(work[1]) == before
    holder.kill()
    holder.wait()
    write(work, "folder", {})
    assert f"out.partial: going on with what process {holder.pid} on " in caplog.text


def test_a_writer_in_this_process_and_one_that_is_interrupted(work, caplog):
    with Unfinished(work[1] / "out", REQUEST) as unfinished:
        unfinished.begin()
        with pytest.raises(FileExistsError, match=f"is being written by process {os.getpid()} on"):
            write(work, "folder")
    write(work, "folder")
    assert not caplog.messages, "it has said that it ended"


def test_without_locks_the_identity_decides(work, monkeypatch, expected, holder, caplog):
    """As on Windows, and on file systems without them."""
    holder.kill()
    holder.wait()
    monkeypatch.setattr(whole_files, "fcntl", None)
    journal = work[1] / "out.partial.journal"
    lines = journal.read_text().splitlines()
    dead = json.loads(lines[-1])["writer"]
    for change in ({"host": "elsewhere"}, {"pid": os.getpid(), "started": module._started(os.getpid())}):
        journal.write_text("\n".join([*lines[:-1], json.dumps({"writer": dead | change}), ""]))
        with pytest.raises(FileExistsError, match="out is being written by process"):
            write(work, "folder", {})
    recycled = dead | {"pid": os.getpid()}  # the number of a process that has ended
    journal.write_text("\n".join([*lines[:-1], json.dumps({"writer": recycled}), ""]))
    write(work, "folder", {})
    assert "going on with what process" in caplog.text
    assert tree(work[1]) == expected["folder"]


def test_without_locks_one_waits_for_the_other(work, monkeypatch):
    monkeypatch.setattr(whole_files, "fcntl", None)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    done = []

    def wait():
        with Unfinished(work[1] / "out", REQUEST, waits=True) as unfinished:
            done.append(unfinished.target.exists())

    with Unfinished(work[1] / "out", REQUEST) as unfinished:
        write_plan(work[0]["folder"], unfinished, "")
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        unfinished.place()
    waiting.join()
    assert done == [True] and [path.name for path in work[1].iterdir()] == ["out"]


def test_a_journal_that_another_process_has_just_removed(work, monkeypatch):
    """It has finished between our opening the journal and locking it."""
    opened = []

    def finish(handle, wait):
        opened.append(handle)
        if len(opened) == 1:
            (work[1] / "out.partial.journal").unlink()
        return whole_files.lock(handle, wait)

    monkeypatch.setattr(module, "lock", finish)
    with Unfinished(work[1] / "out", REQUEST) as unfinished:
        assert len(opened) == 2 and unfinished.journal.exists()
        with pytest.raises(FileExistsError, match="is being written"):
            write(work, "folder")
