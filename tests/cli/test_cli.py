"""The command line as a person and as a script use it: files, exit codes, one clear line for each mistake."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.checkpoints.lora_writers import save_one_layer
from tests.cli.commands import QUICK, picture, run
from tests.video.test_recipe import KNOWN, carried
from tests.video.test_result import read
from wan22 import WanT2VPipeline, read_recipe, tiny_checkpoint
from wan22.cli import reproduce
from wan22.cli.loading import split_strength
from wan22.cli.running import free_name
from wan22.pipelines.call.preview import Previewer

# ---- making videos ----


def test_a_prompt(here):
    out, err = run("t2v", "A red circle, moving!", "--seed", 4, *QUICK)
    assert out == "a-red-circle-moving.mp4\n"
    assert "no --model given: this is tiny-t2v" in err and "seed 4" in err
    assert len(read(here / "a-red-circle-moving.mp4")[1]) == 5
    recipe = read_recipe(here / "a-red-circle-moving.mp4")
    assert recipe.prompts == ("A red circle, moving!",) and recipe.seeds == (4,)
    out, _ = run("t2v", "A red circle, moving!", *QUICK, "-q")
    assert out == "a-red-circle-moving-2.mp4\n", "nothing is replaced unless it is said"


def test_every_option_reaches_the_call(here):
    file = save_one_layer(WanT2VPipeline.from_pretrained(tiny_checkpoint()), here / "lora.safetensors")
    options = {
        "--negative-prompt": "blue",
        "--height": 32,
        "--width": 48,
        "--num-videos": 2,
        "--guidance-scale": 2.5,
        "--guidance-scale-2": 1.5,
        "--guidance": '{"name": "apg", "eta": 0.5}',
        "--guidance-interval": "0,0.9",
        "--flow-shift": 6,
        "--max-sequence-length": 9,
        "--noise-device": "cpu",
        "--dtype": "bf16",
        "--lora": f"{file}=0.5",
        "--attention-kwargs": '{"scale": 0.5}',
        "--preview": "now.png",
        "--preview-every": 1,
        "--output": "out.webp",
        "--quality": 50,
        "--seed": 3,
    }
    flat = [str(part) for pair in options.items() for part in pair]
    out, _ = run("t2v", "a", *QUICK, *flat, "--tiling", "--accelerate", "--contact-sheet", "--json", "-q")
    result = json.loads(out)
    assert result["files"] == ["out-1.webp", "out-2.webp", "out-sheet.png"]
    recipe = read_recipe("out-2.webp")
    assert (recipe.height, recipe.width, recipe.num_frames, recipe.num_inference_steps) == (32, 48, 5, 2)
    assert (recipe.guidance_scale, recipe.guidance_scale_2, recipe.flow_shift) == (2.5, 1.5, 6.0)
    assert recipe.guidance["name"] == "apg" and recipe.guidance["eta"] == 0.5
    assert recipe.guidance_interval == [0.0, 0.9]
    assert recipe.negative_prompt == ["blue"] and recipe.seeds == (4,)
    assert recipe.max_sequence_length == 9 and recipe.noise_device == "cpu"
    assert recipe.attention_kwargs == {"scale": 0.5}
    assert recipe.dtypes["transformer"] == "bfloat16" and recipe.dtypes["vae"] == "float32"
    assert recipe.loras[0].strengths == {"transformer": 0.5, "transformer_2": 0.5}
    assert recipe.changes["tiled"] and recipe.changes["accelerated"]
    assert Image.open("now.png").size[0] >= 256 and Image.open("out-sheet.png").size[0] > 256
    assert result["recipe"]["call"]["seed"] == [3, 4] and not result["stopped"]
    run("t2v", "a", "--sigmas", "1,0.5", "--frames", 5, "-o", "b.mp4", "-q")
    assert read_recipe("b.mp4").sigmas == [1.0, 0.5]
    arguments = ["--guidance", "cfg-zero*", "-g", "3,2", "--frames", 5, "--steps", 2, "-q"]
    run("t2v", "a", *arguments, "-o", "c.mp4")
    recipe = read_recipe("c.mp4")
    assert recipe.guidance == {"name": "cfg-zero*", "zero_steps": None}
    assert recipe.guidance_scale == [3.0, 2.0] and recipe.guidance_scale_2 is None
    _, err = run("t2v", "a", *arguments, "--steps", 3, "-o", "d.mp4", code=1)
    assert "--guidance-scale has 2 values for 3 steps" in err


def test_an_image(here):
    picture("a.png", (96, 64))
    run("i2v", "a.png", "it moves", "--max-area", 64 * 64, *QUICK, "-o", "a.mp4", "--fit", "pad", "-q")
    recipe = read_recipe("a.mp4")
    assert recipe.image == ["a.png"] and recipe.fit == "pad"
    assert (recipe.width, recipe.height) == (64, 48)
    run("i2v", "a.png", "b", "--last-image", "a.png", "--model", "tiny-i2v", *QUICK, "-o", "b.mp4", "-q")
    assert read_recipe("b.mp4").last_image == ["a.png"]


def test_models_of_every_kind(here):
    folder = tiny_checkpoint()
    run("t2v", "a", "--model", folder, *QUICK, "-o", "a.mp4", "-q", "--seed", 1)
    run("t2v", "a", "--model", "Tiny-T2V", *QUICK, "-o", "b.mp4", "-q", "--seed", 1)
    assert (here / "a.mp4").read_bytes() == (here / "b.mp4").read_bytes()
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    _, err = run("t2v", "a", "--model", file, code=1)
    assert "is one file; --vae, --text-encoder, --tokenizer must be given, too" in err
    _, err = run("t2v", "a", "--model", folder, "--low", file, code=1)
    assert "--low goes with a --model that is a file" in err


def single_files():
    """Return the options for the miniature's weights as single files."""
    folder, weights = tiny_checkpoint(), "diffusion_pytorch_model.safetensors"
    options = {
        "--model": folder / "transformer" / weights,
        "--low": folder / "transformer_2" / weights,
        "--vae": folder / "vae" / weights,
        "--text-encoder": folder / "text_encoder" / "model.safetensors",
        "--tokenizer": folder / "tokenizer",
    }
    return [part for pair in options.items() for part in pair]


def test_single_files_take_every_option(here):
    """A budget for the memory was ignored, quantising refused."""
    _, err = run("t2v", "a", *single_files(), "--memory", "1KB", *QUICK, code=1)
    assert "is a GPU's" in err or "does not fit into" in err
    assert not list(here.iterdir())
    _, err = run("t2v", "a", *single_files(), "--revision", "main", *QUICK, code=1)
    assert "--revision main is for repositories" in err
    run("t2v", "a", *single_files(), "--memory", "auto", "--quantize", "int8", *QUICK, "-o", "a.mp4", "-q")
    found = read_recipe("a.mp4")
    assert found.changes["quantized"] == {"transformer": {"int8": 60}, "transformer_2": {"int8": 60}}
    assert found.memory == "auto"


def test_made_again(here):
    run("t2v", "a", *QUICK, "--seed", 7, "-o", "a.mp4", "-q", "--dtype", "bf16")
    out, _ = run("reproduce", "a.mp4", "-q")
    assert out == "a-again.mp4\n"
    assert np.array_equal(read("a.mp4")[1], read("a-again.mp4")[1])
    _, err = run("reproduce", "a.mp4", "--model", "tiny-ti2v", "-q", code=1)
    assert "is another file" in err
    run("t2v", "a", *QUICK, "--seed", 7, "-o", "b.mp4", "-q", "--attention-backend", "math")
    run("reproduce", "b.mp4", "-q", "--contact-sheet")
    assert np.array_equal(read("b.mp4")[1], read("b-again.mp4")[1]), "by the same kernel"
    assert (here / "b-again-sheet.png").exists()
    run("t2v", "a", *single_files(), *QUICK, "--seed", 7, "-o", "c.mp4", "-q")
    _, err = run("reproduce", "c.mp4", "-q", code=1)
    name = Path(single_files()[1]).name
    assert f"give --model {name} --low {name} --vae" in err, "it may be anybody's"
    assert "recipes leave out the folders" in err and str(tiny_checkpoint()) not in err
    run("reproduce", "c.mp4", *single_files(), "-q")
    assert np.array_equal(read("c.mp4")[1], read("c-again.mp4")[1]), "from the same files"


def test_made_again_with_the_expert_and_the_blocks_that_were_quantised(here):
    run("t2v", "a", *QUICK, "--seed", 7, "-q", "--quantize", "fp8:low:keep=1,0", "-o", "a.mp4")
    found = read_recipe("a.mp4").changes["quantized"]
    assert found == {"transformer_2": {"fp8": 50, "blocks kept": "0"}}
    run("reproduce", "a.mp4", "-q")
    assert np.array_equal(read("a.mp4")[1], read("a-again.mp4")[1])
    out, _ = run("plan", "tiny-t2v", "--quantize", "fp8:low:keep=1,0")
    assert "fp8:low:keep=1,0, which changes the result" in out


def test_made_again_as_it_was_set_up(here, caplog):
    """Quantised and planned as the recipe says; another method is refused by name, or with --anyway told."""
    made = ["t2v", "a", *QUICK, "--seed", 7, "-q", "--quantize", "int8"]
    run(*made, "--memory", "auto", "--model", "tiny-t2v", "-o", "a.mp4")
    run("reproduce", "a.mp4", "-q")
    assert np.array_equal(read("a.mp4")[1], read("a-again.mp4")[1])
    assert read_recipe("a-again.mp4").memory == "auto"
    _, err = run("reproduce", "a.mp4", "-q", "--quantize", "fp8", code=1)
    assert "made with changes {'quantized'" in err and "int8" in err and "fp8" in err
    run("reproduce", "a.mp4", "--quantize", "fp8", "--anyway", "-o", "b.mp4")
    assert "the video is another" in caplog.text
    assert not np.array_equal(read("a.mp4")[1], read("b.mp4")[1])


def test_what_a_file_does_not_say(here):
    run("t2v", "a secret", *QUICK, "--seed", 7, "-q", "--no-prompt", "--contact-sheet", "--dtype", "bf16")
    assert sorted(path.name for path in here.iterdir()) == ["video-sheet.png", "video.mp4"]
    assert b"secret" not in (here / "video.mp4").read_bytes()
    assert "the recipe has no prompt" in run("reproduce", "video.mp4", "-q", code=1)[1]
    run("reproduce", "video.mp4", "-q", "--prompt", "a secret", "-o", "b.mp4")
    assert np.array_equal(read("video.mp4")[1], read("b.mp4")[1])
    run("t2v", "a", *QUICK, "-q", "--no-recipe", "-o", "c.mp4")
    assert "carries no recipe" in run("info", "c.mp4", code=1)[1]


# ---- recipes that anybody may have written ----


@pytest.fixture
def offline(monkeypatch):
    """Fails where the hub is asked."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a server was asked"))


@pytest.mark.parametrize(
    ("entries", "options"),
    [
        ({"origin": {"place": "evil/repository"}}, "--model evil/repository, or --allow-download"),
        ({"checkpoint": "Wan2.2-T2V-A14B"}, "--model Wan2.2-T2V-A14B, or --allow-download"),
        ({"origin": {"place": "/etc/a folder"}}, "--model '/etc/a folder'"),
        ({"origin": {"place": "a, b, c, d"}}, "--model a --vae b --text-encoder c --tokenizer d"),
        ({"loras": [("evil/lora", {})]}, "--lora evil/lora, or --allow-download"),
        ({"loras": [("~/a.safetensors, b", {})]}, "--lora-high '~/a.safetensors' --lora-low b"),
        (
            {"call": {"image": ["/etc/a.png"], "last_image": ["http://u:p@a/b"]}},
            "--image /etc/a.png --last-image",
        ),
        ({"call": {"image": ["a.png"] * 20}}, "--image a.png " * 8 + "and 12 more"),
        ({"origin": {"place": "evil/\x1b[31m"}}, r"--model 'evil/\x1b[31m'"),
    ],
)
def test_what_a_recipe_names_is_not_loaded_unasked(entries, options, here, offline):
    call = KNOWN["call"] | entries.pop("call", {})
    loras = [{"name": "a", "source": place, "strengths": s} for place, s in entries.pop("loras", ())]
    file = carried({**KNOWN, "call": call, "loras": loras, **entries}, here)
    _, err = run("reproduce", file.name, code=1)
    assert f"error: {file.name} names what is not loaded unasked; give {options}" in err
    assert "u:p" not in err and "\x1b" not in err


def test_allow_download_is_for_nothing_on_this_machine(here):
    for place in ("a/b", "a/b/c.safetensors", "https://huggingface.co/a/b", "wan2.2-t2v-a14b"):
        reproduce.ask(here / "a.mp4", [reproduce.Named("--model", place)], allow_download=True)
    (here / "a" / "b").mkdir(parents=True)
    local = [("--model", place) for place in ("a/b", "/a/b", "../b", "~/b", "c", "file:///a/b", "\\\\a/b")]
    for entry in (*local, ("--image", "c/d.png"), ("--image", "file:///a.png")):
        with pytest.raises(ValueError, match=r"a.mp4 names what is not loaded unasked") as caught:
            reproduce.ask(here / "a.mp4", [reproduce.Named(*entry)], allow_download=True)
        assert "--allow-download" not in str(caught.value)


def test_on_a_terminal_a_person_is_asked(here, monkeypatch):
    image = picture("a.png")
    run("i2v", image, "b", *QUICK, "--max-area", 32 * 32, "--seed", 7, "-o", "a.mp4", "-q")
    _, err = run("reproduce", "a.mp4", "-q", code=1)
    assert "give --image a.png" in err
    run("reproduce", "a.mp4", "-q", "--image", "a.png", "-o", "b.mp4")
    monkeypatch.setattr("wan22.cli.reproduce.at_a_terminal", lambda: True)
    _, err = run("reproduce", "a.mp4", "-q", "-o", "c.mp4", answer="n\n", code=1)
    assert "the recipe in a.mp4 names: --image a.png load them from there?" in err
    run("reproduce", "a.mp4", "-q", "-o", "c.mp4", answer="y\n")
    frames = [read(f"{name}.mp4")[1] for name in "abc"]
    assert np.array_equal(frames[0], frames[1]) and np.array_equal(frames[0], frames[2])


def test_loras_that_are_given_have_the_recipes_strengths(here):
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint())
    pipe.load_lora_weights(save_one_layer(pipe, here / "a.safetensors"), strength=(0.3, 0.2))
    pipe("a", seed=1, height=32, width=32, num_frames=5, num_inference_steps=2).save("a.mp4")
    _, err = run("reproduce", "a.mp4", "-q", code=1)
    assert "give --lora a.safetensors" in err and str(here) not in err
    run("reproduce", "a.mp4", "-q", "--lora", here / "a.safetensors")
    assert np.array_equal(read("a.mp4")[1], read("a-again.mp4")[1])


@pytest.mark.parametrize("name", ["save", "__loader__", "_dynamo", "a b", ""])
def test_a_dtype_that_is_none_is_refused(name, here):
    file = carried({**KNOWN, "dtypes": {"transformer": name}}, here)
    assert "which is none of torch; give --dtype bf16" in run("reproduce", file.name, code=1)[1]


def test_json_is_all_that_scripts_read(here):
    command = [sys.executable, "-m", "wan22.cli", "t2v", "a", *QUICK, "--json", "-o", "a.mp4"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == ["a.mp4"]
    out, err = run("t2v", "a", "--json", "-o", "a.mp4", code=1)
    assert json.loads(out) == {"error": "a.mp4 exists; --overwrite replaces it"}
    assert "error: a.mp4 exists" in err


# ---- Ctrl-C ----


@pytest.fixture
def interrupted(monkeypatch):
    """Sends Ctrl-C from the preview after a step, as often as asked."""
    times = []
    step = Previewer.step

    def pressed(self, i, *rest):
        step(self, i, *rest)
        for _ in range(times[0] if i == 1 else 0):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Previewer, "step", pressed)
    before = signal.getsignal(signal.SIGINT)
    yield times
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_ends_with_the_step_and_keeps_what_there_is(interrupted, here):
    interrupted.append(1)
    slow = ["--steps", 4, "--frames", 5, "--preview", "p.png", "--preview-every", 1]
    out, err = run("t2v", "a", *slow, "-o", "a.mp4", code=130)
    assert out == "a.mp4\n" and "stopped after step 1 of 4" in err
    assert len(read(here / "a.mp4")[1]) == 5
    assert read_recipe("a.mp4").steps_done == 1


def test_a_second_ctrl_c_ends_at_once(interrupted, here):
    interrupted.append(2)
    slow = ["--steps", 4, "--frames", 5, "--preview", "p.png", "--preview-every", 1]
    _, err = run("t2v", "a", *slow, "-o", "a.mp4", code=130)
    assert "error: interrupted" in err
    assert not (here / "a.mp4").exists()


# ---- what a person mistypes ----


def test_help_has_examples():
    for command in ("t2v", "i2v", "batch", "reproduce", "convert", "prepare", "info", "models"):
        assert f"wan22 {command}" in run(command, "--help")[0].split("Usage", 1)[1].split("\n", 1)[1]
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run("--version")[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t2v", "x", "--steps", "0"], "--steps 0 must be an int, at least 1"),
        (
            ["t2v", "x", "--frames", "80"],
            "--num-frames 80 must be an int, 1 + a multiple of 4",
        ),
        (["t2v", "x", "--height", "50"], "--height 50 must be an int, a positive multiple of 16"),
        (
            ["t2v", "x", "--model", "tiny-ti2v", "--height", "720", "--width", "1280"],
            "--height 720 must be an int, a positive multiple of 32; the nearest are 704 and 736",
        ),
        (["t2v", "x", "--model", "Wan2.2-T2V-14B"], "say Wan2.2-T2V-A14B, or see `wan22 models`"),
        (["t2v", "x", "--model", "/gone/away"], "there is no file or folder /gone/away"),
        (["t2v", "x", "--model", "tiny-i2v"], "use wan22 i2v"),
        (["t2v", "x", "-o", "x.avi"], "must end in .mp4, .mov, .mkv"),
        (["t2v", "x", "--quality", "500"], "--quality 500 must be an int, 1 to 100"),
        (["t2v", "x", "--sigmas", "1;2"], "--sigmas 1;2 must be numbers with commas between"),
        (["t2v", "x", "--attention-kwargs", "0.5"], "--attention-kwargs 0.5 must be a JSON object"),
        (["t2v", "x", "--quantize", "q4"], "q4"),
        (["t2v", "x", "--lora", "gone.safetensors"], "no file gone.safetensors"),
        (["t2v", "x", "--device", "cuda:99"], "--device cuda:99 is not there"),
        (["t2v", "x", "--preview", "x.bmp"], "x.bmp must end in .png, .gif, .webp"),
        (["t2v", "x", "--preview-every", "2"], "--preview-every needs --preview FILE"),
        (["t2v", "x", "--distilled", "fast"], "--distilled fast must be one of 'lightning-4'"),
        (["t2v", "x", "--recipe", "lightning-4"], "--recipe is called --distilled now"),
        (["t2v", "x", "--attention-backend", "flash9"], "flash9"),
        (["i2v", "gone.png", "x"], "there is no file gone.png"),
        (["i2v", "text.png", "x"], "text.png"),
        (["info", "gone.mp4"], "there is no file or folder gone.mp4"),
        (["info", "text.png"], "carries no recipe of wan22"),
        (["reproduce", "gone.mp4"], "there is no file gone.mp4"),
        (["batch", "gone.jsonl", "-o", "out"], "there is no file gone.jsonl"),
        (["batch", "text.png", "-o", "out"], "line 1: not JSON"),
    ],
)
def test_one_clear_line(arguments, message, here):
    (here / "text.png").write_text("no picture")
    _, err = run(*arguments, code=1)
    line = err[err.index("error: ") :]
    assert message in line
    assert "Traceback" not in err
    assert sorted(p.name for p in here.iterdir()) == ["text.png"], "nothing is left half done"


@pytest.fixture
def small_files():
    """Lets no file grow beyond 3000 bytes, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("ending", ["mp4", "gif", "npy"])
def test_no_room_on_the_disk(ending, here, small_files):
    _, err = run("t2v", "a", "--steps", "1", "--frames", "17", "-o", f"a.{ending}", "-q", code=1)
    line = err[err.index("error: ") :]
    assert "disk full" in line or "File too large" in line
    assert "Traceback" not in err and not list(here.iterdir())


@pytest.mark.parametrize(
    "arguments", [["t2v"], ["t2v", "x", "--steps", "a"], ["t2v", "x", "--nope"], ["nope"]]
)
def test_usage_errors(arguments):
    _, err = run(*arguments, code=2)
    assert "Usage: " in err


def test_an_existing_contact_sheet_is_kept(here):
    (here / "a-sheet.png").write_text("mine")
    _, err = run("t2v", "x", *QUICK, "-o", "a.mp4", "--contact-sheet", code=1)
    assert "a-sheet.png exists" in err and (here / "a-sheet.png").read_text() == "mine"
    assert not (here / "a.mp4").exists()
    run("t2v", "x", *QUICK, "-o", "a.mp4", "--contact-sheet", "--overwrite")
    assert Image.open(here / "a-sheet.png").size[0] > 64


def test_a_name_is_free_in_its_format(here):
    (here / "a.mp4").touch()
    (here / "b-0001.png").touch()
    (here / "c-1.gif").touch()
    assert free_name("a").name == "a-2.mp4" and free_name("a", ending=".gif").name == "a.gif"
    assert free_name("b", ending=".png").name == "b-2.png"
    assert free_name("c", ending=".gif").name == "c-2.gif", "several videos have the name"


def test_small_things(here):
    assert split_strength("a=b.safetensors=0.5") == ("a=b.safetensors", 0.5)
    assert split_strength("a.safetensors") == ("a.safetensors", 1.0)
    (here / "odd=2").touch()
    assert split_strength("odd=2") == ("odd=2", 1.0)
    assert free_name("!!!").name == "video.mp4"
    assert len(free_name("x" * 500).name) <= 64
    assert free_name("两只猫 🐈 box").name == "两只猫-box.mp4"
