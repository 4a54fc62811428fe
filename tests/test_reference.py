"""make docs writes a page for each public module, without a link that leads nowhere."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.reference import MODULES, bases, broken_links


@pytest.mark.slow
def test_the_reference_is_built(tmp_path):
    """In a process of its own: building it resolves the names that are loaded late."""
    pytest.importorskip("pdoc", reason="needs pdoc")
    command = [sys.executable, "-m", "tests.reference", tmp_path]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).with_suffix("") for path in tmp_path.rglob("*.html")}
    assert pages == {Path("index"), *(Path(*name.split(".")) for name in [*MODULES, *bases()])}
    assert "Make videos of prompts." in (tmp_path / "wan22.html").read_text(encoding="utf-8")
    assert "from_pretrained" in (tmp_path / "wan22/pipelines/loading/pipeline.html").read_text(
        encoding="utf-8"
    )


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="x"></h1><a href="#x"></a><a href="#y"></a><a href="b.html#z"></a>'
    )
    (tmp_path / "b.html").write_text('<p id="z"><a href="c.html"></a><a href="https://example.org/c"></a>')
    assert broken_links(tmp_path) == ["a.html: #y", "b.html: c.html"]
