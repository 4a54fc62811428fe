"""Prompt cleaning and umT5 encoding."""

import html
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import byte_tokenizer, golden_text_encoder, random_text_encoder
from tests.golden_data import golden, relative_error
from wan22 import WanT2VPipeline, tiny_checkpoint
from wan22.pipelines.call.text import MAX_TEXT_TOKENS, clean_prompt, encode_prompt, pad_tokens
from wan22.presets import NEGATIVE_PROMPT

CASES = [(f"case{c}", i) for c, sizes in enumerate(([64, 20, 1], [170], [33])) for i in range(len(sizes))]


class GivenTokens:
    """A tokenizer that answers any text with the given ids."""

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, text, **kwargs):
        return SimpleNamespace(input_ids=self.ids)


# ---- cleaning ----


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a  red\n\tcircle ", "a red circle"),
        ("a\u00a0red\u3000circle", "a red circle"),
        ("a cat &amp; a dog", "a cat & a dog"),
        ("a cat &amp;amp; a dog", "a cat & a dog"),
        ("a &amp;lt;b&amp;gt; c", "a <b> c"),
        (
            "<b> &amp;amp; c",
            "<b> & c",
        ),  # ftfy leaves entities beside a tag alone, so both rounds are seen here
        ("<b> &amp;amp;amp; c", "<b> &amp; c"),
        ("cafÃ© in the rain", "café in the rain"),  # UTF-8 read as Latin-1
        ("it\u2019s a \u201ctest\u201d", 'it\'s a "test"'),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_cleaning(text, cleaned):
    assert clean_prompt(text) == cleaned


def test_cleaning_the_default_negative_prompt():
    cleaned = clean_prompt(NEGATIVE_PROMPT)
    assert "，" in NEGATIVE_PROMPT
    assert cleaned == NEGATIVE_PROMPT.replace("，", ",")
    assert clean_prompt(cleaned) == cleaned


# ---- umT5 against the official encoder ----


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_golden_padded_and_masked(case):
    _, _, tensors = golden("t5")
    with torch.no_grad():
        out = golden_text_encoder()(
            tensors[f"{case}.ids"], attention_mask=tensors[f"{case}.mask"]
        ).last_hidden_state
    for i, mask in enumerate(tensors[f"{case}.mask"]):
        assert relative_error(out[i, : int(mask.sum())], tensors[f"{case}.out{i}"]) <= 2e-6


@pytest.mark.parametrize(("case", "i"), CASES)
def test_golden_through_encode_prompt(case, i):
    """The real tokens alone give what padded and masked ones do; past them the rows are zero."""
    _, _, tensors = golden("t5")
    reference = tensors[f"{case}.out{i}"]
    ids = tensors[f"{case}.ids"][i, : len(reference)].tolist()
    with torch.no_grad():
        rows = encode_prompt(GivenTokens(ids), golden_text_encoder(), "any")
    assert rows.shape == (1, MAX_TEXT_TOKENS, reference.shape[1])
    assert relative_error(rows[0, : len(ids)], reference) <= 2e-6
    assert not rows[0, len(ids) :].any()


def test_each_layer_has_its_own_positions():
    """The golden weights can tell: with layer 0's table everywhere the result is another."""
    encoder = golden_text_encoder()
    tables = [block.layer[0].SelfAttention.relative_attention_bias.weight for block in encoder.encoder.block]
    assert not any(torch.equal(tables[0], table) for table in tables[1:])


# ---- encode_prompt ----


@pytest.fixture(scope="module")
def parts():
    return byte_tokenizer(), random_text_encoder(1)


@torch.no_grad()
def test_encodes_the_cleaned_text(parts):
    assert torch.equal(encode_prompt(*parts, "a  &amp;amp; b "), encode_prompt(*parts, "a & b"))
    assert not torch.equal(encode_prompt(*parts, "a & c"), encode_prompt(*parts, "a & b"))


@torch.no_grad()
def test_the_empty_prompt_is_its_end_token(parts):
    rows = encode_prompt(*parts, "")
    assert rows[0, 0].any()
    assert not rows[0, 1:].any()


@torch.no_grad()
def test_a_long_prompt_is_cut_with_a_warning(parts, caplog):
    with caplog.at_level(logging.WARNING):
        rows = encode_prompt(*parts, "abcdefgh", max_tokens=6)
    assert "9 tokens, 6 are used" in caplog.text
    assert "'fgh'" in caplog.text
    assert torch.equal(rows, encode_prompt(*parts, "abcde")), "the end token stays"


@torch.no_grad()
def test_a_prompt_that_just_fits_is_not_cut(parts, caplog):
    with caplog.at_level(logging.WARNING):
        rows = encode_prompt(*parts, "a" * (MAX_TEXT_TOKENS - 1))
    assert not caplog.records
    assert rows.shape[1] == MAX_TEXT_TOKENS
    assert rows[0, -1].any()


@torch.no_grad()
def test_cut_at_512_tokens(parts, caplog):
    with caplog.at_level(logging.WARNING):
        rows = encode_prompt(*parts, "a" * MAX_TEXT_TOKENS)
    assert "513 tokens, 512 are used; ignored: 'a'" in caplog.text
    assert torch.equal(rows, encode_prompt(*parts, "a" * (MAX_TEXT_TOKENS - 1)))


def test_pad_tokens():
    rows = torch.randn(2, 5, 3)
    padded = pad_tokens(rows)
    assert padded.shape == (2, MAX_TEXT_TOKENS, 3)
    assert torch.equal(padded[:, :5], rows)
    assert not padded[:, 5:].any()
    full = torch.randn(1, MAX_TEXT_TOKENS, 3)
    assert torch.equal(pad_tokens(full), full)


@pytest.mark.parametrize(
    ("prompt", "known"),
    [
        ("一只红色的狐狸", "0 of the 1 words"),
        ("a fox runs through the snow", "2 of the 6 words"),
        (["a red circle", "рыжая лиса"], "0 of the 2 words"),
        ("a red circle moves to the right on a blue background", None),
        ("", None),
    ],
)
def test_the_miniature_says_what_it_does_not_know(prompt, known, caplog):
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    pipe(prompt, num_frames=1, height=16, width=16, num_inference_steps=1, output_type="latent")
    told = [r.getMessage() for r in caplog.records if "tiny-t2v is a miniature that knows" in r.getMessage()]
    assert len(told) == (known is not None)
    assert known is None or known in told[0]


def test_an_empty_prompt_is_the_empty_text():
    """As a prompt; an empty negative prompt is the checkpoint's default."""
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint())
    embeds, _ = pipe.encode_prompt("", do_classifier_free_guidance=False)
    spaces, _ = pipe.encode_prompt(" \n", do_classifier_free_guidance=False)
    assert torch.equal(embeds, spaces)
    assert embeds[0, 0].any() and not embeds[0, 1:].any(), "the end token alone"


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="&")))
def test_of_printable_ascii_nothing_is_repaired(text):
    import ftfy

    assert html.unescape(html.unescape(ftfy.fix_text(text))) == text


def test_plain_english_does_not_import_ftfy():
    code = """
import sys
from wan22.pipelines.call.text import clean_prompt
assert clean_prompt(" a  red circle ") == "a red circle" and "ftfy" not in sys.modules
assert clean_prompt("a &amp; b") == "a & b" and "ftfy" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
