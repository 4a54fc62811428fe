"""Many videos with one load: finished ones are skipped, failures recorded."""

import json
import os
import signal

import pytest

from tests.cli.commands import picture, run
from wan22 import read_recipe
from wan22.pipelines.attached.memory import Memory


def items(here, *lines):
    (here / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return here / "list.jsonl"


def records(here):
    return [json.loads(line) for line in (here / "out" / "results.jsonl").read_text().splitlines()]


SHORT = {"num_inference_steps": 2, "num_frames": 5}


def test_a_batch(here):
    file = items(
        here,
        {"prompt": "a red circle", "seed": 1, **SHORT},
        {"prompt": "bad", "height": 50, "width": 64, **SHORT},
        {"prompt": "three", "name": "drei 🐈", **SHORT},
        {"prompt": "a red circle", "seed": 1, **SHORT},
    )
    out, err = run("batch", file, "-o", "out", "--json", code=1)
    assert json.loads(out) == {"done": 3, "failed": 1, "results": "out/results.jsonl"}
    assert "failed: height=50" in err and "4 items, 0 of them done already" in err
    assert sorted(p.name for p in (here / "out").iterdir()) == [
        "a-red-circle-2.mp4",
        "a-red-circle.mp4",
        "drei 🐈.mp4",
        "results.jsonl",
    ]
    assert [r["status"] for r in records(here)] == ["done", "failed", "done", "done"]
    assert "height=50" in records(here)[1]["error"]
    times = {p: p.stat().st_mtime_ns for p in (here / "out").glob("*.mp4")}
    _, err = run("batch", file, "-o", "out", code=1)
    assert "4 items, 3 of them done already" in err, "only what failed is tried again"
    assert times == {p: p.stat().st_mtime_ns for p in (here / "out").glob("*.mp4")}
    (here / "out" / "a-red-circle.mp4").unlink()
    file = items(here, {"prompt": "a red circle", "seed": 1, **SHORT})
    out, _ = run("batch", file, "-o", "out")
    assert out == "1 done, 0 failed: out\n"
    assert (here / "out" / "a-red-circle.mp4").exists(), "a video that is gone is made again"
    assert read_recipe(here / "out" / "a-red-circle.mp4").seeds == (1,)
    with (here / "out" / "results.jsonl").open("a") as file_of_records:
        file_of_records.write('{"key": "cut of')  # a run that was killed
    run("batch", file, "-o", "out")


def test_a_batch_of_plain_prompts(here):
    (here / "list.txt").write_text("\ufeffred\n\nblue – 蓝\nred\n", encoding="utf-8")
    run("batch", "list.txt", "-o", "out", "--ending", ".gif", "-q")
    assert [r["item"]["prompt"] for r in records(here)] == ["red", "blue – 蓝", "red"]
    assert sorted(p.name for p in (here / "out").glob("*.gif")) == ["blue-蓝.gif", "red-2.gif", "red.gif"]


def test_a_batch_is_known_by_its_folder_from_anywhere(here, monkeypatch):
    file = items(here, {"prompt": "one", **SHORT})
    run("batch", file, "-o", "out", "-q")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    _, err = run("batch", file, "-o", "../out")
    assert "1 items, 1 of them done already" in err


def test_a_batchs_ending_is_refused_before_anything_is_made(here):
    file = items(here, {"prompt": "one", **SHORT})
    _, err = run("batch", file, "-o", "out", "--ending", ".avi", code=1)
    assert "video.avi must end in .mp4" in err and not (here / "out").exists()


def test_a_batch_with_images(here):
    (here / "lists").mkdir()
    picture(here / "lists" / "a.png")
    (here / "lists" / "list.jsonl").write_text(json.dumps({"prompt": "it moves", "image": "a.png", **SHORT}))
    run("batch", "lists/list.jsonl", "-o", "out", "-q")
    assert read_recipe(next((here / "out").glob("*.mp4"))).image == ["lists/a.png"]


def test_a_batch_goes_on_after_ctrl_c(here, monkeypatch):
    file = items(here, {"prompt": "one", **SHORT}, {"prompt": "two", **SHORT})
    with monkeypatch.context() as patch:
        patch.setattr(Memory, "prefetch_next", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        _, err = run("batch", file, "-o", "out", code=130)
    assert "the same command goes on from here" in err
    assert [r["status"] for r in records(here)] == ["stopped"]
    out, _ = run("batch", file, "-o", "out", "-q")
    assert out.startswith("2 done, 0 failed")
    assert [r["status"] for r in records(here)] == ["stopped", "done", "done"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", 'line 2: an item is {"prompt"'),
        ('{"prompt": 5}', 'line 2: an item is {"prompt"'),
        ('{"prompt": "a", "stepz": 5}', "line 2 has no argument stepz"),
        ('{"prompt": "a", "latents": [0]}', "line 2: latents is for calls in Python"),
        ('{"prompt": "a", "output_type": "pil"}', "line 2: output_type is for calls in Python; the videos"),
        ('{"prompt": "a", "return_dict": false}', "line 2: return_dict is for calls in Python"),
        ('{"prompt": "a", "recipe": "lightning-4"}', "line 2: recipe is called distilled now"),
        ('{"prompt": "a", "name": "../x"}', "line 2: name='../x' must be a file's name"),
        ('{"prompt": "a", "name": "first"}', "line 2: the name 'first' is line 1's, too"),
    ],
)
def test_lines_that_are_no_items(line, message, here):
    (here / "list.jsonl").write_text('{"prompt": "a", "name": "first"}\n' + line)
    _, err = run("batch", "list.jsonl", "-o", "out", code=1)
    assert message in err
    assert not (here / "out").exists()
