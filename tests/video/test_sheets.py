"""Text on pictures: wrapped, whole, and readable."""

import numpy as np
import pytest
from PIL import ImageFont

from wan22.video import sheets
from wan22.video.sheets import FONT_SIZE, INDENT, contact_sheet, text_block


def lines_of(text, width):
    font = ImageFont.load_default(FONT_SIZE)
    found = sheets._wrapped(text, font, width)
    assert all(font.getlength(line) <= width for line in found)
    return found


def test_words_are_kept_whole_and_all_are_there():
    text = "a red kite over dunes, slow dolly shot, warm light " * 5
    found = lines_of(text, 200)
    assert len(found) > 5 and " ".join(found) == text.strip()
    assert lines_of("made in 1.5\N{NO-BREAK SPACE}s", 60)[-1] == "1.5\N{NO-BREAK SPACE}s"
    long = "x" * 300
    assert "".join(lines_of(f"{long} y", 100)).replace(" ", "") == f"{long}y"
    assert lines_of("", 100) == [""]


def test_spaces_that_hold_together_are_spaces():
    assert np.array_equal(text_block("1.5\N{NO-BREAK SPACE}s", 300), text_block("1.5 s", 300))


def test_nothing_touches_the_edge():
    block = text_block("W" * 500 + "\nseed 4", 300)
    assert block.shape[1] == 300 and block.any()
    assert not block[:, :INDENT].any() and not block[:, -1:].any() and not block[-2:].any()


def test_of_a_long_text_the_settings_stay():
    text = "word " * 500
    whole, short = text_block(f"{text}\nseed 4", 300, 10**6), text_block(f"{text}\nseed 4", 300, 5)
    height = FONT_SIZE + sheets.SPACING
    assert len(short) == 5 * height + 2 * sheets.SPACING < len(whole)
    last = slice(-height - sheets.SPACING, None)
    assert np.array_equal(short[last], whole[last]), "the seed is on the last line"
    assert np.array_equal(short[: 3 * height], whole[: 3 * height])
    assert not np.array_equal(short[: 4 * height], whole[: 4 * height]), "the fourth ends with …"


def test_characters_that_no_font_has_are_told(caplog, monkeypatch):
    monkeypatch.setattr(sheets, "FONTS", ())
    sheets._font.cache_clear()
    text_block("a cat: 50 % (of it)…", 300)
    assert not caplog.records
    text_block("猫猫", 300)
    assert "no font here has 1 of the characters of a caption, such as 猫" in caplog.text
    sheets._font.cache_clear()


def test_a_narrow_sheet_has_room_for_its_text():
    video = np.full((3, 16, 16, 3), 200, np.uint8)
    plain = np.asarray(contact_sheet([video], [], 2, 16))
    assert plain.shape == (20, 40, 3)
    told = np.asarray(contact_sheet([video, video[:1]], ["one", "two"], 2, 16, "both"))
    assert told.shape[1] == sheets.NARROWEST and told.shape[0] == 2 * 20 + 3 * (
        FONT_SIZE + 3 * sheets.SPACING
    )
    assert np.array_equal(told[-18:-2, 2:18], video[0]) and not told[-18:-2, 18:].any()


@pytest.mark.parametrize("width", [8, 16])
def test_frames_are_scaled_by_whole_numbers_or_smoothly(width):
    frame = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert np.array_equal(
        sheets.scaled(frame, (width, width)), frame.repeat(width // 8, 0).repeat(width // 8, 1)
    )
