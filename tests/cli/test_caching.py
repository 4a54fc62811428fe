"""`wan22 cache`: what it lists, encodes, keeps and refuses."""

import json

import pytest

from tests.cli.commands import run
from tests.videos import frames_of
from wan22.training.data.cached import CachedClips
from wan22.video.writers import write_encoded

SMALL = ("--frames", "5", "--resolution", "64x48")


@pytest.fixture
def clips(here):
    (here / "clips").mkdir()
    write_encoded(iter(frames_of(9)), here / "clips" / "a.mp4", 8)
    (here / "clips" / "a.txt").write_text(
        "a red circle moves to the right, and moves, and moves, and moves on"
    )
    return here / "clips"


def test_encoding(clips, here):
    out, err = run("cache", clips, *SMALL)
    assert out == f"{here}/clips-cache\n"
    assert "no --model given: this is for tiny-t2v" in err
    assert "1 clips for tiny-t2v, to" in err and "1 clips and 1 captions encoded, 0 clips were there" in err
    assert "size frames clips with repeats 64x48 5 1 1" in err
    found = CachedClips.open("clips-cache")
    assert len(found) == 1 and found.items[0].shape == (16, 2, 6, 8)
    out, err = run("cache", clips, *SMALL, "--repeats", "2", "--json")
    report = json.loads(out)
    assert (report["clips"], report["encoded"], report["captions"], report["kept"]) == (1, 0, 0, 1)
    assert report["buckets"] == [{"frames": 5, "height": 48, "width": 64, "clips": 1, "with_repeats": 2}]
    _, err = run("cache", clips, "--frames", "9", "--resolution", "64x48", "-q")
    assert "1 files of earlier runs: no clip needs them; --prune removes them: a_00000-005_64x48_" in err
    out, err = run("cache", clips, "--frames", "9", "--resolution", "64x48", "--prune")
    assert "1 files of earlier runs: removed" in err
    assert len(list((here / "clips-cache").glob("*.safetensors"))) == 2


def test_a_dry_run_lists_and_writes_nothing(clips, here):
    out, _ = run("cache", clips, *SMALL, "--extraction", "chunk", "--dry-run")
    assert "a.mp4  0-4     64x48  a red circle moves" in out and "…" in out
    assert "1 clips for tiny-t2v, at most 0.0" in out and not (here / "clips-cache").exists()
    out, _ = run("cache", clips, *SMALL, "--model", "tiny-ti2v", "-o", "there", "--dry-run", "--json")
    found = json.loads(out)
    assert found["model"] == "tiny-ti2v" and found["folder"] == "there" and found["bytes"] > 0
    assert found["items"][0]["bucket"] == [5, 32, 64] and found["items"][0]["caption"].startswith("a red")


def test_a_file_of_settings(clips, here):
    text = f'[[datasets]]\nvideo_directory = "{clips}"\ntarget_frames = [5, 9]\nresolution = [64, 48]\n'
    (here / "data.toml").write_text(text + 'cache_directory = "kept"\n')
    out, _ = run("cache", "data.toml", "--dry-run", "--json")
    assert json.loads(out)["folder"] == "kept" or json.loads(out)["folder"].endswith("/kept")
    assert [b["frames"] for b in json.loads(out)["buckets"]] == [5, 9]
    (here / "data.toml").write_text(text)
    assert json.loads(run("cache", "data.toml", "--dry-run", "--json")[0])["folder"] == "data-cache"
    _, err = run("cache", "data.toml", "--repeats", "2", code=1)
    assert "data.toml has its own settings; write --repeats there" in err or "write repeats there" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--frames", "5,6"), "frames=6 must be an int, 1 + a multiple of 4; the nearest are 5 and 9"),
        (("--frames", "many"), "--frames many must be whole numbers, such as 17,33,81"),
        (("--resolution", "64"), "--resolution 64 must be whole numbers, such as 832x480"),
        (("--frames", "33"), "1 of 1 files cannot be used: "),
        (("--model", "clips/a.mp4"), "is a file; give a folder, or a repository"),
        (("--keep-fps", "--source-fps", "8"), "--keep-fps and --source-fps are given"),
    ],
)
def test_what_is_refused(options, message, clips):
    _, err = run("cache", "clips", *options, code=1)
    assert message.replace("frames=6", "--frames 6") in err or message in err
    assert not clips.with_name("clips-cache").exists()


def test_files_that_cannot_be_used(clips):
    (clips / "b.mp4").write_bytes(b"junk")
    (clips / "b.txt").write_text("b")
    (clips / "c.png").write_bytes(b"junk")
    out, err = run("cache", "clips", *SMALL, "--json", code=1)
    assert "2 of 2 files" not in err and "2 of 3 files cannot be used: " in json.loads(out)["error"]
    assert "c.png: there is no caption c.txt; --default-caption serves files without" in err
    _, err = run("cache", "clips", *SMALL, "--skip")
    assert err.count("left out: ") == 2 and "1 clips and 1 captions encoded" in err
    _, err = run("cache", "nothing", code=1)
    assert "there is no folder or file nothing" in err
