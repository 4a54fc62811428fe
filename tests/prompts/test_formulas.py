"""Prompts by formula: the text that they make, and what they refuse."""

import dataclasses

import pytest

from wan22.prompts import ImagePrompt, TextPrompt, multi_shot, unknown_terms
from wan22.prompts.formulas import TABLES
from wan22.prompts.vocabulary import VOCABULARY

FIELDS = [field.name for field in dataclasses.fields(TextPrompt)]


def test_the_basic_formula():
    prompt = TextPrompt("a red fox", "a snowy wood at dawn", "trotting toward the camera")
    assert str(prompt) == "A red fox, a snowy wood at dawn, trotting toward the camera."


def test_the_advanced_formula():
    prompt = TextPrompt(
        "a red fox",
        "a snowy wood",
        "trotting",
        style="felt style",
        effect="time-lapse photography",
        camera="camera pushes in",
        tone="cool tones",
        lens="long-focus lens",
        composition="center composition",
        shot="close-up, low-angle shot",
        time="dawn",
        light="daylight, rim light",
    )
    assert str(prompt) == (
        "A red fox, a snowy wood, trotting. Daylight, rim light, dawn, close-up, low-angle shot, "
        "center composition, long-focus lens, cool tones, camera pushes in. "
        "Felt style, time-lapse photography."
    )


def test_image_to_video():
    assert str(ImagePrompt("the fox turns its head")) == "The fox turns its head."
    assert str(ImagePrompt("the fox turns", "fixed camera")) == "The fox turns. Fixed camera."
    assert str(ImagePrompt("", "camera pulls back")) == "Camera pulls back."


def test_sentences_stay_sentences():
    prompt = TextPrompt("A fox stands.", " in snow, ", "it looks up!", light="Soft light.", tone="warm tones")
    assert str(prompt) == "A fox stands. In snow, it looks up! Soft light. Warm tones."
    assert str(TextPrompt("一只狐狸。", "雪地")) == "一只狐狸。 雪地."


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_in_the_text_once(name):
    values = {"subject": "a fox", name: "xylophone"}
    assert str(TextPrompt(**values)).lower().count("xylophone") == 1


@pytest.mark.parametrize("left_out", FIELDS[1:])
def test_an_empty_field_leaves_no_trace(left_out):
    full = {name: f"word{i}" for i, name in enumerate(FIELDS)}
    text = str(TextPrompt(**{**full, left_out: "  "}))
    assert text.lower().count("word") == len(FIELDS) - 1
    for trace in ("  ", ", ,", ",.", "..", ". ,"):
        assert trace not in text
    assert text.endswith(".")


def test_prompts_are_frozen_and_comparable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TextPrompt("a fox").subject = "a hare"
    assert TextPrompt("a fox", tone="warm tones") == TextPrompt("a fox", tone="warm tones")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextPrompt(""), "subject='' must say who or what is seen, such as 'a red fox"),
        (lambda: TextPrompt(" \n"), "subject=' .n' must say"),
        (lambda: TextPrompt("a fox", tone=None), "tone=None must be a string; '' leaves it out"),
        (lambda: TextPrompt(7), "subject=7 must be a string"),
        (lambda: ImagePrompt(" "), "motion=' ' must say what moves, such as 'the fox slowly turns its head'"),
        (lambda: ImagePrompt(["a"]), "motion=..a.. must be a string"),
        (lambda: multi_shot("x", [(0, "a")]), "shot 1's seconds=0 must be a number, above 0; such as 2"),
        (lambda: multi_shot("x", [(2, "a"), (-1, "b")]), "shot 2's seconds=-1 must"),
        (lambda: multi_shot("x", [(float("nan"), "a")]), "shot 1's seconds=nan"),
        (lambda: multi_shot("x", [(float("inf"), "a")]), "shot 1's seconds=inf"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shots_are_stamped():
    shots = [
        (2, TextPrompt("a fox", motion="wakes", shot="close-up")),
        (2.5, "it runs"),
        (0.5, ImagePrompt("snow falls")),
    ]
    assert multi_shot("a fox's morning", shots) == (
        "A fox's morning. Shot 1 [0-2s] A fox, wakes. Close-up. Shot 2 [2-4.5s] It runs. "
        "Shot 3 [4.5-5s] Snow falls."
    )


@pytest.mark.parametrize("table", VOCABULARY)
def test_the_vocabulary_is_clean(table):
    terms = VOCABULARY[table]
    assert terms
    assert len({term.casefold() for term in terms}) == len(terms)
    for term in terms:
        assert term == " ".join(term.split())
        assert "," not in term
        assert term[0].islower() or term.startswith("3D")


def test_the_vocabulary_cannot_be_changed():
    with pytest.raises(TypeError):
        VOCABULARY["tone"] = ()


def test_every_field_has_its_terms():
    assert set(TABLES) == set(FIELDS[3:])
    tables = [table for names in TABLES.values() for table in names]
    assert len(set(tables)) == len(tables)
    assert set(VOCABULARY) - set(tables) == {"emotion", "motion"}  # these are part of subject and motion


@pytest.mark.parametrize("name", TABLES)
def test_the_vocabulary_is_known(name):
    terms = [term for table in TABLES[name] for term in VOCABULARY[table]]
    assert unknown_terms(TextPrompt("a fox", **{name: ", ".join(terms)})) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shot", "Low angle shot"),
        ("shot", "close-up shot of its eyes"),
        ("light", "soft rim lighting, Side Lighting."),
        ("camera", "slowly the camera pushes in"),
        ("tone", "soft light"),  # another field's term
        ("camera", ""),
    ],
)
def test_other_spellings_are_known(name, value):
    assert unknown_terms(TextPrompt("a fox", **{name: value})) == {}


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("light", "rim lite, daylight", {"rim lite": "rim light"}),
        ("camera", "camera pans lefft", {"camera pans lefft": "camera pans left"}),
        ("style", "Water colour", {"Water colour": "watercolor"}),
        ("tone", "warm tone, coolish", {"warm tone": "warm tones", "coolish": None}),
        ("shot", "clos-up，two-shot", {"clos-up": "close-up"}),
        ("light", "lamp glow. soft light", {"lamp glow": None}),
        ("effect", "unsilhouetted", {"unsilhouetted": None}),  # a term inside a word does not count
    ],
)
def test_unknown_terms(name, value, found):
    terms = unknown_terms(TextPrompt("rim lite", "camera pans lefft", "clos-up", **{name: value}))
    assert {term: close[0] if close else None for term, close in terms.items()} == found


def test_unknown_terms_of_an_image_prompt():
    assert list(unknown_terms(ImagePrompt("rim lite", "zoooms"))) == ["zoooms"]
