"""What notebooks show: small tables, whose text is escaped and bounded."""

from html.parser import HTMLParser

import pytest

from tests.builders import SMALL, random_pipeline
from wan22.checks import LONGEST
from wan22.notebooks import table

EVIL = "<script>alert('x')</script>\x1b[31m"


class Reader(HTMLParser):
    """Collects the tags and the text of a page, and refuses what is not closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], set(), ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_table():
    page = Reader(table("a title", [("name", "one\ntwo")]))
    assert page.tags == {"div", "b", "table", "tr", "th", "td", "br"}
    assert page.text == "a titlenameonetwo"


def test_text_is_escaped_and_bounded():
    page = Reader(table(EVIL, [(EVIL, EVIL), ("long", "x" * 10**6)]))
    assert "script" not in page.tags and page.text.count("<script>") == 3
    assert "\x1b" not in page.text and len(page.text) < 3 * LONGEST


@pytest.fixture(scope="module")
def pipe():
    pipe = random_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.register_to_config(_name_or_path=EVIL)
    return pipe


SHOWN = {
    "pipeline": lambda pipe: (pipe, "AutoencoderKLWan, float32"),
    "plan": lambda pipe: (pipe.fit(height=32, width=32, num_frames=5), "host peak"),
    "recipe": lambda pipe: (pipe(EVIL, seed=3, **SMALL).recipe, "seed3"),
    "stream": lambda pipe: (pipe.stream(EVIL, **SMALL), "stream.save(path)"),
}


@pytest.mark.parametrize("what", SHOWN)
def test_what_a_notebook_shows(what, pipe):
    shown, said = SHOWN[what](pipe)
    page = Reader(shown._repr_html_())
    assert said in page.text
    assert not page.tags & {"script", "img", "a"}
    assert len(shown._repr_html_()) < 6000
