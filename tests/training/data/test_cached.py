"""Opening a folder of encoded clips: every file is of one checkpoint, whole and finite, or it is named."""

import json

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import builders
from wan22.checkpoints.files.safetensors import read_header
from wan22.training.data.cache import cache
from wan22.training.data.cached import EMPTY, INDEX, CachedClips


@pytest.fixture
def folder(clips, tmp_path):
    cache(builders.random_i2v_pipeline(), clips, tmp_path / "out", frames=(5,), resolution=(64, 48))
    return tmp_path / "out"


def first(folder):
    return sorted(folder.glob("tall*"))[0]


def rewritten(path, tensors=None, **metadata):
    """Write a clip's file with other tensors, None without one, or other metadata."""
    tensors = {**{n: t.clone() for n, t in load_file(path).items()}, **(tensors or {})}
    old = read_header(path)[1]
    save_file({n: t for n, t in tensors.items() if t is not None}, path, {**old, **metadata})


def test_a_folder(folder):
    clips = CachedClips.open(str(folder))
    assert len(clips) == 2 and [item.name for item in clips.items] == [
        "tall.mp4, frames 0-4",
        "wide.mp4, frames 0-4",
    ]
    assert [item.caption for item in clips.items] == ["a tall thing moves", "a wide thing moves"]
    assert clips.items[0].shape == (16, 2, 8, 6) == tuple(clips.read(0).latents.shape)
    assert clips.read(0).condition.shape == (20, 2, 8, 6) and clips.read(0).image_embeds is None
    assert clips.read(0).latents.is_contiguous() and clips.empty_text.ndim == 2
    assert set(clips.checkpoint) >= {"kind", "name", "vae", "text_encoder", "fps", "versions"}
    sample = clips.read(0)
    mapped = {entry.path for entry in psutil.Process().memory_maps()}
    assert not mapped & {str(item.file) for item in clips.items} and sample.latents.any()


INDICES = {
    "format": "its format is 'x', not wan22",
    "checkpoint": "is damaged",
    "clips": "it lists no clips",
}


@pytest.mark.parametrize("entry", INDICES)
def test_an_index_with_another_entry(entry, folder):
    index = json.loads((folder / INDEX).read_text())
    index[entry] = "x" if entry == "format" else [] if entry == "clips" else {"kind": "t2v"}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=rf"clips\.json is damaged: .*; run `wan22 cache` again|{INDICES[entry]}"
    ):
        CachedClips.open(folder)


@pytest.mark.parametrize(
    "clip",
    [
        {"file": "../a", "repeats": 1},
        {"file": "a", "repeats": 0},
        {"file": "a"},
        {"file": 3, "repeats": 1},
        5,
    ],
)
def test_an_index_with_a_clip_that_is_none(clip, folder):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "clips": [clip]}))
    with pytest.raises(ValueError, match=r"clips\.json is damaged"):
        CachedClips.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 10**5, "\x00"])
def test_an_index_that_is_none(text, folder):
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"clips\.json is damaged: ") as error:
        CachedClips.open(folder)
    assert len(str(error.value)) < 800


def test_folders_that_are_not_there_or_not_finished(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is not there"):
        CachedClips.open(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"has no clips\.json; run `wan22 cache` again"):
        CachedClips.open(tmp_path)
    (folder / EMPTY).rename(folder / "other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*no-caption\.safetensors"):
        CachedClips.open(folder)
    (folder / "other.safetensors").rename(folder / EMPTY)
    first(folder).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"there is no file .*tall_00000-005_\d+x\d+_\w+\.safetensors; run"
    ):
        CachedClips.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "t2v"}, r"belongs to another checkpoint: its kind is not that of clips\.json"),
        ({"vae": "x"}, "belongs to another checkpoint: its vae"),
        ({"text_encoder": "x"}, "belongs to another checkpoint: its text_encoder"),
        ({"format": "x"}, "is no encoded clip"),
        ({"tensors": {"text": None}}, "has no latents or no text yet"),
        ({"tensors": {"latents": None}}, "has no latents or no text yet"),
        ({"tensors": {"condition": None}}, "is not a clip for i2v"),
        ({"tensors": {"condition": torch.zeros(20, 1, 8, 6)}}, "condition and latents have shapes"),
        ({"tensors": {"latents": torch.zeros(16, 0, 8, 6)}}, r"latents is F32 \[16, 0, 8, 6\]"),
        ({"tensors": {"latents": torch.zeros(16, 2, 8, 6, dtype=torch.int8)}}, "latents is I8"),
    ],
)
def test_a_file_that_does_not_fit(change, message, folder):
    rewritten(first(folder), **change)
    with pytest.raises(ValueError, match=message) as error:
        CachedClips.open(folder)
    assert "tall_00000" in str(error.value)


def test_files_that_are_damaged(folder):
    whole = first(folder).read_bytes()
    for data in (whole[:-1], whole + b"x", whole[:20], b"", b"\xff" * 100):
        first(folder).write_bytes(data)
        with pytest.raises(ValueError, match="tall_00000"):
            CachedClips.open(folder)


def test_values_that_are_not_finite(folder):
    clips = CachedClips.open(folder)
    rewritten(first(folder), {"latents": torch.full((16, 2, 8, 6), float("nan"))})
    with pytest.raises(ValueError, match=r"tall_.*: latents is not finite; remove the file, and run"):
        clips.read(0)
    assert clips.read(1).latents.isfinite().all()
