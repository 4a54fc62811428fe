"""The package as the index and pip see it: its name, extras, files, and the page that the README becomes."""

import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import wan22
from wan22.checkpoints.files.gguf import read_gguf
from wan22.extras import DISTRIBUTION, install_command

try:
    import tomllib
except ImportError:  # Python 3.10; pytest brings this one there
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEXTS = [
    *ROOT.glob("*.md"),
    *(path for folder in ("wan22", "tests", "examples") for path in ROOT.glob(f"{folder}/**/*.md")),
    *(path for folder in ("wan22", "examples") for path in ROOT.glob(f"{folder}/**/*.py")),
]


def test_the_name_is_the_one_that_is_installed():
    assert PROJECT["name"] == DISTRIBUTION
    assert install_command("gguf") == 'pip install "wan22-pipelines[gguf]"'


def test_every_extra_that_is_named_exists():
    named = set()
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w-])wan22\[", text), f"{path}: an extra of another distribution"
        named |= {(extra, path.name) for extra in re.findall(r"install_command\([\"'](\w+)[\"']\)", text)}
        extras = re.findall(rf"{DISTRIBUTION}\[([\w,]+)\]", text)
        named |= {(extra, path.name) for extras in extras for extra in extras.split(",")}
    assert {"gguf", "ray", "app"} <= {extra for extra, _ in named}
    assert not {(extra, file) for extra, file in named if extra not in PROJECT["optional-dependencies"]}


def test_a_missing_extra_is_named_with_its_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'high\.gguf is GGUF; .*pip install "wan22-pipelines\[gguf\]"$'):
        read_gguf(tmp_path / "high.gguf")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel as `pip install` builds it."""
    pytest.importorskip("hatchling", reason="needs hatchling")
    pytest.importorskip("hatch_fancy_pypi_readme", reason="needs hatch-fancy-pypi-readme")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", folder, ROOT], check=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(wheel):
    version = wan22.__version__
    assert Path(wheel.filename).name == f"wan22_pipelines-{version}-py3-none-any.whl"
    info = f"wan22_pipelines-{version}.dist-info"
    names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names} == {"wan22", info}
    here = [path for path in (ROOT / "wan22").rglob("*") if path.is_file()]
    assert {name for name in names if name.startswith("wan22/")} == {
        path.relative_to(ROOT).as_posix() for path in here if "__pycache__" not in path.parts
    }
    assert "wan22/py.typed" in names and f"{info}/licenses/LICENSE" in names
    assert b"wan22 = wan22.cli:main" in wheel.read(f"{info}/entry_points.txt")


@pytest.mark.slow
def test_the_page_of_the_index_has_no_links_that_lead_nowhere(wheel):
    (path,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = message_from_bytes(wheel.read(path))
    assert (metadata["Name"], metadata["Author"]) == (DISTRIBUTION, "the wan22 developers")
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert metadata["Description-Content-Type"] == "text/markdown"
    page = wheel.read(path).decode().partition("\n\n")[2]
    assert "# wan22" in page and f"pip install {DISTRIBUTION}" in page
    assert "<img" not in page and "![" not in page
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert links and all(link.startswith(("https://", "#")) for link in links)
