"""Scripts and the command line as torchrun starts them: on one rank or several, and how they end."""

import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch

from tests.accel.parallel.ranks import environment, torchrun
from tests.tiers import slow
from tests.waiting import HANG, until
from wan22 import WanT2VPipeline, read_recipe, tiny_checkpoint

PROMPT = "a red circle moves to the right on a blue background"
SCRIPT = """
import time
from pathlib import Path
import torch
from wan22 import WanT2VPipeline, tiny_checkpoint
from wan22.accel.parallel.environment import rank

pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint("t2v"), dtype=torch.float32, parallel="auto")

def at_step(pipe, step, timestep, given):
    if step == 1:
        Path(f"rank-{rank()}").touch()
        BODY
    return {}

pipe("PROMPT", seed=1, callback_on_step_end=at_step).save("video.npy")
print("saved by", rank())
"""


def start(folder, count, *command):
    return subprocess.Popen(
        [*torchrun(count), *map(str, command)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heeds_ctrl_c,
    )


def heeds_ctrl_c():
    """Let a process heed Ctrl-C where the tests run in the background, and would hand on that they do not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ended(process):
    """Wait for a process, and return its exit code, output and errors.

    That it ends at all is what some tests are about: a rank that is left waits for longer than this.
    """
    try:
        out, err = process.communicate(timeout=HANG)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def script(folder, body):
    file = folder / "script.py"
    file.write_text(SCRIPT.replace("PROMPT", PROMPT).replace("BODY", body))
    return file


@pytest.fixture(scope="module")
def alone():
    """The video of one process, as `save` writes it."""
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint("t2v"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, seed=1).frames[0]


def is_of(file, alone):
    return np.linalg.norm(np.load(file) - alone) <= 1e-5 * np.linalg.norm(alone)


@pytest.mark.parametrize("count", [2, *slow((0, 1))])
def test_one_script_on_any_number_of_ranks(count, alone, tmp_path):
    # Of several ranks each must end on Ctrl-C in whatever it waits for, where Python's handler would not run.
    handler = "signal.SIG_DFL if pipe.parallel is not None else signal.default_int_handler"
    body = f"import signal; assert signal.getsignal(signal.SIGINT) is ({handler})"
    code, out, err = ended(start(tmp_path, count, script(tmp_path, body)))
    assert code == 0, err
    assert out.count("saved by") == max(count, 1)
    assert is_of(tmp_path / "video.npy", alone)


COMMAND = ("-m", "wan22.cli", "t2v", PROMPT, "--seed", 1, "-o", "video.npy")


def test_the_command_line(alone, tmp_path):
    options = ("--json", "--contact-sheet", "--parallel", "ulysses=2,fsdp=true")
    code, out, err = ended(start(tmp_path, 2, *COMMAND, *options))
    assert code == 0, err
    told = json.loads(out)  # once
    assert told["files"] == ["video.npy", "video-sheet.png"]
    assert told["recipe"]["device"].endswith("2 ranks: ulysses 2, VAE rows, FSDP")
    assert err.count("no --model given") == 1 and err.count("tiny-t2v on cpu") == 1
    assert is_of(tmp_path / "video.npy", alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (2, (), "error: video.npy exists; --overwrite replaces it"),
        (2, ("--device", "cpu"), "each rank has a device of its own; leave it out"),
        (0, ("--parallel", "auto"), "--parallel auto is for several ranks"),
    ],
)
def test_what_the_command_line_refuses(count, options, message, tmp_path):
    """Ranks tell of an error that all have once, and the first one does, however late it is."""
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        f"from wan22.cli import main, reporting\nreporting.GRACE_SECONDS = 2 * {HANG}\nmain()\n"
    )
    if not options:
        (tmp_path / "video.npy").touch()
    code, _, err = ended(start(tmp_path, count, wrapper, *COMMAND[2:], *options))
    assert code == 1 and err.count(message) == 1
    assert "of rank 1" not in err


@pytest.mark.slow
def test_a_batch(tmp_path):
    (tmp_path / "items.jsonl").write_text(
        "\n".join(
            json.dumps(item)
            for item in (
                {"prompt": PROMPT, "seed": 1, "num_inference_steps": 2},
                {"prompt": PROMPT, "height": 33},
                {"prompt": "a blue square grows", "num_inference_steps": 2},
            )
        )
    )
    command = ("-m", "wan22.cli", "batch", "items.jsonl", "-o", "videos")
    code, out, err = ended(start(tmp_path, 2, *command))
    records = [json.loads(line) for line in (tmp_path / "videos" / "results.jsonl").read_text().splitlines()]
    assert code == 1 and [record["status"] for record in records] == ["done", "failed", "done"], err
    assert "height=33" in records[1]["error"] and err.count("height=33") == 1
    assert out.splitlines() == ["2 done, 1 failed: videos"]
    videos = sorted((tmp_path / "videos").glob("*.mp4"))
    assert len(videos) == 2 and read_recipe(videos[0]).num_inference_steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_an_error_of_one_rank_ends_all(tmp_path, which):
    process = start(tmp_path, 2, script(tmp_path, f"if rank() == {which}: raise KeyError('only here')"))
    code, out, err = ended(process)
    assert code != 0 and "KeyError: 'only here'" in err and "saved" not in out


@pytest.mark.slow
def test_an_error_of_one_rank_ends_the_command_line(tmp_path):
    """Memory that only one rank has not, say; the other one waits for it."""
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        "from wan22.accel.parallel.environment import rank\n"
        "from wan22.pipelines.base import WanPipeline\n"
        "from wan22.cli import main\n"
        "def prepare(self, call):\n"
        "    raise MemoryError('no room on this one')\n"
        "if rank() == 1:\n"
        "    WanPipeline.draw_latents = prepare\n"
        "main()\n"
    )
    code, _, err = ended(start(tmp_path, 2, wrapper, "t2v", PROMPT, "-o", "video.mp4"))
    assert code != 0 and "error of rank 1: MemoryError: no room on this one" in err
    assert not (tmp_path / "video.mp4").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["script", "command line"])
def test_ctrl_c_ends_all(tmp_path, what):
    """While one rank waits for another: Python itself would notice nothing."""
    if what == "script":
        command = [script(tmp_path, f"if rank() == 1: time.sleep({2 * HANG})")]
    else:
        wrapper = tmp_path / "wrapper.py"
        wrapper.write_text(
            "import time\n"
            "from pathlib import Path\n"
            "from wan22.accel.parallel.environment import rank\n"
            "from wan22.pipelines.base import WanPipeline\n"
            "from wan22.cli import main\n"
            "prepare = WanPipeline.draw_latents\n"
            "def wait(self, call):\n"
            "    Path(f'rank-{rank()}').touch()\n"
            f"    time.sleep({2 * HANG} if rank() == 1 else 0)\n"
            "    return prepare(self, call)\n"
            "WanPipeline.draw_latents = wait\n"
            "main()\n"
        )
        command = [wrapper, "t2v", PROMPT, "-o", "video.mp4"]
    process = start(tmp_path, 2, *command)
    until(lambda: len(list(tmp_path.glob("rank-*"))) == 2 or process.poll() is not None)
    assert process.poll() is None, ended(process)
    time.sleep(1)  # by now the first rank waits, most often; it must end before that, too
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    code, out, _ = ended(process)
    assert code != 0 and "saved" not in out
    assert not list(tmp_path.glob("video.*"))
