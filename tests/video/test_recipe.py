"""Recipes are read from files that anybody may have written: as data, and nothing else is opened."""

import json
import os
import struct
import sys
import time
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from wan22 import read_recipe
from wan22.video import metadata, schema, writers
from wan22.video.recipe import Origin, Recipe, UsedLora

KNOWN = {
    "wan22_recipe": 2,
    "checkpoint": "tiny-t2v",
    "pipeline": "WanT2VPipeline",
    "call": {"prompt": ["a"], "seed": [1], "num_videos_per_prompt": 1, "guidance_scale": 4.0},
    "width": 32,
    "height": 32,
    "num_frames": 5,
    "fps": 16,
    "scheduler": "FlowMatchUniPCScheduler",
    "num_inference_steps": 2,
}
OLD = json.loads((Path(__file__).parent / "recipes_format_1.json").read_text())["two"]


def carried(text, folder, ending=".png"):
    """Write a video with a text as its recipe; return its (first) file."""
    path = folder / f"clip{ending}"
    frames = np.zeros((1, 32, 32, 3), np.uint8)
    writers.write(iter(frames), path, 16, text if isinstance(text, str) else json.dumps(text))
    return folder / "clip-0001.png" if ending == ".png" else path


# ---- values ----


def test_the_schema_has_the_fields_of_the_classes():
    assert schema.NEEDED.keys() | schema.OTHERS.keys() == {f.name for f in fields(Recipe)} - {"outside"}
    read = Recipe.from_json(
        json.dumps(
            {
                **KNOWN,
                "origin": {"place": "a"},
                "loras": [{"name": "a", "source": None, "strengths": {"transformer": 1}}],
            }
        )
    )
    assert read.origin == Origin("a") and read.loras == (UsedLora("a", None, {"transformer": 1}),)
    assert read.outside and "outside" not in read.to_json()


@pytest.mark.parametrize(
    ("entry", "value", "rule"),
    [
        ("checkpoint", 5, "checkpoint=5 must be a text"),
        ("checkpoint", "a" * 5000, "must be a text of at most 4096"),
        ("width", True, "width=True must be a whole number from 1"),
        ("dtypes", {"a\x1b[31m": 5}, r"dtypes\.a\\x1b\[31m=5 must be a text"),
        ("width", 1.5, "width=1.5 must be a whole number"),
        ("fps", 10**30, "must be a whole number from 1 to 9223372036854775807"),
        ("num_frames", None, "num_frames=None must be"),
        ("boundary_ratio", float("nan"), "boundary_ratio=nan must be a finite number"),
        ("origin", "a", "origin='a' must be a table"),
        ("origin", {"revision": "a"}, "origin.place is missing"),
        ("origin", {"place": "a", "revision": 5}, "origin.revision=5 must be a text"),
        ("loras", "abc", "loras='abc' must be a list"),
        ("loras", [{"name": "a", "source": 5, "strengths": {}}], r"loras.0..source=5 must be a text"),
        ("loras", [{"name": "a", "source": "a", "strengths": "x"}], "strengths='x' must be a table"),
        ("dtypes", {"transformer": 1}, "dtypes.transformer=1 must be a text"),
        ("changes", [1, 2], "must be a table"),
        ("changes", {"a": [[[[[[[1]]]]]]]}, "must be nested at most 6 times"),
        ("scheduler_config", None, "scheduler_config=None must be a table"),
        ("device", {"a": 1}, "device={'a': 1} must be a text"),
        ("call", [], r"call=\[\] must be a table"),
        ("call", {}, "call.prompt is missing"),
    ],
)
def test_an_entry_of_another_kind_is_named(entry, value, rule, tmp_path):
    path = carried({**KNOWN, entry: value}, tmp_path)
    with pytest.raises(ValueError, match=rf"clip-0001.png carries no recipe of wan22: .*{rule}") as caught:
        read_recipe(path)
    assert (
        type(caught.value) is ValueError and len(str(caught.value)) < 1500 and "\n" not in str(caught.value)
    )


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("prompt", "abc", "call.prompt='abc' must be a list of 1"),
        ("prompt", [5], r"call.prompt.0.=5 must be a text"),
        ("seed", [-1], r"call.seed.0.=-1 must be a whole number from 0"),
        ("seed", [1, 2], "call.seed has 2 values for 1 videos"),
        ("num_videos_per_prompt", 10**9, "call.seed has 1 values for 1000000000 videos"),
        ("max_sequence_length", None, "call.max_sequence_length=None must be a whole number from 1"),
        ("sigmas", 5, "call.sigmas=5 must be a list"),
        ("guidance_scale", float("inf"), "call.guidance_scale=inf must be a finite number"),
        ("guidance_scale", [], "call.guidance_scale=\\[\\] must be a list of 1 to"),
        ("guidance_scale", [3.0, "2"], r"call.guidance_scale\[1\]='2' must be a finite number"),
        ("guidance", "apg", "call.guidance='apg' must be a table"),
        ("guidance", {"eta": 0.5}, "call.guidance.name is missing"),
        ("guidance", {"name": 3}, "call.guidance.name=3 must be a text"),
        ("guidance_interval", [0.2, None], r"call.guidance_interval\[1\]=None must be a finite number"),
        ("attention_kwargs", "x", "call.attention_kwargs='x' must be a table"),
        ("of another pipeline", [[[[[[[1]]]]]]], "nested at most 6 times"),
    ],
)
def test_an_argument_of_another_kind_is_named(argument, value, rule):
    with pytest.raises(ValueError, match=rule):
        Recipe.from_json(json.dumps({**KNOWN, "call": {**KNOWN["call"], argument: value}}))


@pytest.mark.parametrize("entry", ["prompts", "seeds", "negative_prompts", "height", "flow_shift", "loras"])
def test_the_first_format_is_checked_as_the_present_one(entry):
    for value in (5, "abc", {"a": 1}):
        if entry != "height" or value != 5:
            with pytest.raises(ValueError, match=r"this is no recipe of wan22: .* must be|missing"):
                Recipe.from_json(json.dumps({**OLD, entry: value if entry != "flow_shift" else [value]}))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "5", "null", '"a"', "[" * 100_000, '{"a":' * 100_000, '{"wan22_recipe": 1}',
        '{"wan22_recipe": "a"}', '{"wan22_recipe": null}', '{"wan22_recipe": [1]}',
        '{"wan22_recipe": ' + "9" * 9999,
        json.dumps(KNOWN) + "\0", "x" * (schema.MOST_TEXT + 1),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused_in_a_few_words(text):
    with pytest.raises(ValueError, match="no recipe of wan22") as caught:
        Recipe.from_json(text)
    assert len(str(caught.value)) < 600


def test_what_is_unknown_is_left_out_and_text_is_text():
    code = "__import__('os').system('true')"
    odd = {code: code, "__class__": "x", "outside": False, "checkpoint": "\ud800\x1b[31m[/red]"}
    recipe = Recipe.from_json(json.dumps({**KNOWN, **odd}))
    assert recipe.checkpoint == "\ud800\x1b[31m[/red]" and recipe.outside
    assert not hasattr(recipe, code)


# ---- files ----


@pytest.fixture
def opened(monkeypatch):
    """What is opened, run and asked while a recipe is read."""
    events, active = [], [True]

    def hook(event, arguments):
        if active and event in ("open", "socket.connect", "subprocess.Popen", "os.system", "os.posix_spawn"):
            events.append((event, str(arguments[0])))

    sys.addaudithook(hook)
    yield events
    active.clear()


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".gif", ".webp", ".png"])
def test_reading_opens_nothing_that_a_recipe_names(ending, tmp_path, opened):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"x")
    named = {"origin": {"place": str(secret)}, "checkpoint": str(secret)}
    named["loras"] = [{"name": "a", "source": str(secret), "strengths": {}}]
    named["call"] = {**KNOWN["call"], "image": [str(secret), "http://127.0.0.1:1/a.png"]}
    path = carried({**KNOWN, **named}, tmp_path, ending)
    opened.clear()
    assert read_recipe(path).image == named["call"]["image"]
    assert [e for e in opened if "secret" in e[1] or e[0] in ("socket.connect", "os.system")] == []


def test_a_playlist_that_calls_itself_an_mp4_opens_nothing(tmp_path):
    """ffmpeg would tell the format by its contents, and open what is listed."""
    os.mkfifo(tmp_path / "pipe")  # whoever opens it waits
    text = f"ffcoftyp version 1.0\nffconcat version 1.0\nfile '{tmp_path / 'pipe'}'\n"
    for content in (text, f"#EXTftypM3U\n#EXTM3U\n#EXTINF:1,\n{tmp_path / 'pipe'}\n", "    ftyp"):
        (tmp_path / "a.mp4").write_text(content)
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"a.mp4 carries no recipe of wan22"):
            read_recipe(tmp_path / "a.mp4")
        assert time.monotonic() - start < metadata.MOST_SECONDS / 2


def png_with(kind, body, size=(32, 32)):
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (kind, body), (b"IDAT", b""), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks
    )


@pytest.mark.parametrize(
    "data",
    [
        png_with(b"tEXt", b"wan22\0" + b"x" * 70_000_000),
        png_with(b"zTXt", b"wan22\0\0" + zlib.compress(bytes(50_000_000))),
        png_with(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000))),
        png_with(b"tEXt", b"a\0b", (200_000, 200_000)),
        png_with(b"eXIf", b"II*\0\xff\xff\xff\xff"),
        b"\x89PNG\r\n\x1a\n\xff\xff\xff\xfftEXt" + bytes(64),
        b"GIF89a",
        b"RIFF\xff\xff\xff\xffWEBPVP8X",
    ],
    ids=["text", "zipped", "profile", "pixels", "exif", "chunk", "gif", "webp"],
)
def test_a_broken_or_bloated_picture_carries_no_recipe(data, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"a.png carries no recipe of wan22: its metadata was removed"):
        read_recipe(tmp_path / "a.png")


def test_broken_text_in_an_mp4(tmp_path):
    path = carried(KNOWN, tmp_path, ".mp4")
    path.write_bytes(path.read_bytes().replace(b"tiny-t2v", b"tiny-\xff\xfe\xfd"))
    try:
        assert "\ufffd" in read_recipe(path).checkpoint
    except ValueError as error:
        assert "clip.mp4 carries no recipe" in str(error)
