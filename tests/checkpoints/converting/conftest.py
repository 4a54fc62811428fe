"""What is written in the tests of unfinished results."""

import shutil

import pytest

from tests.checkpoints.converting.small_results import FORMS, tensors, tree, write
from wan22.checkpoints.converting.plan import Plan


@pytest.fixture
def work(tmp_path):
    """Plans of a folder with shards, a .pth, texts and copies, and of one file; and the place for them."""
    copied = tmp_path / "tokenizer"
    (copied / "more").mkdir(parents=True)
    (copied / "tokenizer.json").write_text("{}" * 100)
    (copied / "more/notes.txt").write_text("notes")
    folder, single = Plan(), Plan()
    folder.add("vae/model.safetensors", tensors(3), 4000)
    folder.add("t5.pth", tensors(2), None)
    folder.texts["config.json"] = '{"a": 1}'
    folder.copies["tokenizer"] = copied
    single.add("out.safetensors", tensors(2), None)
    (tmp_path / "place").mkdir()
    return {"folder": folder, "single": single}, tmp_path / "place"


@pytest.fixture
def expected(work):
    """What is there in the end, by form."""
    plans, place = work
    found = {}
    for form in FORMS:
        write((plans, place), form)
        found[form] = tree(place)
        shutil.rmtree(place)
        place.mkdir()
    return found
