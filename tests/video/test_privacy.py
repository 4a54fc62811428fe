"""What leaves the machine: no folders, no passwords."""

import json
from dataclasses import replace

import pytest

from tests.video.test_recipe import KNOWN
from wan22.video.privacy import without_folders
from wan22.video.recipe import Origin, Recipe, UsedLora


@pytest.mark.parametrize(
    ("place", "shared"),
    [
        ("/home/ann/pictures/cat.png", "cat.png"),
        ("/home/ann/models/wan/", "wan"),
        ("~/cat.png", "cat.png"),
        ("~ann/cat.png", "cat.png"),
        ("../ann/cat.png", "cat.png"),
        ("a/../../ann/cat.png", "cat.png"),
        ("C:\\Users\\ann\\cat.png", "cat.png"),
        ("C:/Users/ann/cat.png", "cat.png"),
        ("\\\\server\\ann\\cat.png", "cat.png"),
        ("file:///home/ann/my%20cat.png", "my cat.png"),
        ("FILE://localhost/home/ann/cat.png", "cat.png"),
        ("/", "a folder"),
        ("~", "~"),
        ("cat.png", "cat.png"),
        ("pictures/cat.png", "pictures/cat.png"),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
        ("/home/ann/.cache/hub/models--org--name/snapshots/0a1b", "org/name"),
        ("/home/ann/models--org--name/snapshots/0a1b/high/a.gguf", "org/name/high/a.gguf"),
        ("https://ann:secret@host:8000/a/cat.png?token=1#2", "https://host:8000/a/cat.png"),
        ("http://[/cat.png", "a URL"),
    ],
)  # fmt: skip
def test_what_is_private_goes(place, shared):
    assert without_folders(place) == shared
    assert without_folders(shared) == shared


def test_a_recipe_keeps_its_places_in_memory_and_shares_their_names():
    given = "/home/ann, bob/wan", "google/umt5-xxl"
    origin = Origin(", ".join(given), shared=", ".join(map(without_folders, given)))
    lora = UsedLora("style", "/home/ann/style.safetensors", {"transformer": 1.0})
    call = {**KNOWN["call"], "image": ["/home/ann/cat.png", None]}
    recipe = Recipe.from_json(json.dumps({**KNOWN, "checkpoint": "/home/ann/wan"}))
    recipe = replace(recipe, origin=origin, loras=(lora,), call=call)
    for text in (recipe.to_json(), json.dumps(recipe.to_dict()), recipe.of(0).to_json()):
        assert "ann" not in text and "bob" not in text
    assert recipe.image == ["/home/ann/cat.png", None] and recipe.origin.place == ", ".join(given)
    read = Recipe.from_json(recipe.to_json())
    assert read.image == ["cat.png", None] and read.checkpoint == "wan"
    assert (read.origin.place, read.loras[0].source) == ("wan, google/umt5-xxl", "style.safetensors")
    assert Recipe.from_json(read.to_json()) == read
    old = replace(recipe, origin=Origin("/home/ann/a, /home/ann/b"))  # read from an earlier version's file
    assert json.loads(old.to_json())["origin"]["place"] == "a, b"
