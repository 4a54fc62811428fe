"""What importing costs, which names there are, and which way the imports run."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import wan22

ROOT = Path(wan22.__file__).parent
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "PIL",
    "imageio_ffmpeg",
    "ftfy",
    "peft",
    "safetensors",
}
# What each room may import from the house; a room may always import from itself, and
# from the checks.
MAY_IMPORT = {
    "checks": set(),
    "private_apis": set(),
    "presets": set(),
    "assets": set(),
    "prompts": {"presets"},
    "models": set(),
    "schedulers": set(),
    "checkpoints": {"private_apis", "presets", "models"},
    "video": set(),
    "accel": {"private_apis", "presets", "models", "checkpoints"},
    "pipelines": {"private_apis", "presets", "models", "schedulers", "checkpoints", "accel", "video"},
    "cli": {"presets", "models", "schedulers", "checkpoints", "accel", "pipelines", "assets", "video"},
}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path):
    """Return the rooms that a file imports from, wherever in the file it does so."""
    package = ("wan22", *path.relative_to(ROOT).parts[:-1])
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "wan22" and len(name.split(".")) > 1:
                rooms.add(name.split(".")[1])
    return {room for room in rooms if not room.startswith("__")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    room = room_of(path)
    if room == "__init__":
        return
    assert room in MAY_IMPORT, f"a new room {room}: say here what it may import"
    assert imported_rooms(path) <= MAY_IMPORT[room] | {room, "checks"}


def test_the_walk_sees_imports():
    """Or the test above could not fail."""
    assert imported_rooms(ROOT / "pipelines" / "base.py") >= {"checkpoints", "presets", "pipelines"}
    assert imported_rooms(ROOT / "pipelines" / "loading" / "hub_classes.py") >= {"checkpoints", "schedulers"}


def imported_packages(path):
    """Return the packages that a file imports from outside, wherever in the file it does so."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


def test_models_are_plain_torch():
    """The classes for diffusers, beside the loaders, are what the search has to find something in."""
    frameworks = {"diffusers", "transformers", "accelerate", "peft"}
    for path in (ROOT / "models").rglob("*.py"):
        assert not imported_packages(path) & frameworks, path
    assert imported_packages(ROOT / "checkpoints" / "loading" / "diffusers_models.py") & frameworks


def test_no_room_is_called_wan():
    """diffusers has a module of that name and would record our components as its own."""
    import diffusers

    assert hasattr(diffusers.pipelines, "wan")
    for path in FILES:
        assert not {"wan", "wan.py"} & set(path.relative_to(ROOT).parts)


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def test_importing_does_no_work():
    """Neither the package nor naming what it has loads a library, warns, or prints."""
    told = run("import sys, json, wan22; dir(wan22); wan22.__all__; print(json.dumps(sorted(sys.modules)))")
    loaded = {name.split(".")[0] for name in json.loads(told.stdout)}
    assert "wan22" in loaded
    assert not loaded & HEAVY
    assert told.stderr == ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_run_may_not_need_is_imported_late(path):
    at_import = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = [alias.name for node in at_import for alias in node.names]
    names += [node.module for node in at_import if isinstance(node, ast.ImportFrom) and not node.level]
    late = {"ftfy", "gguf", "imageio_ffmpeg", "peft", "sentencepiece", "transformers"}
    assert not {name.split(".")[0] for name in names} & late


def test_every_public_name_resolves():
    assert len(set(wan22.__all__)) == len(wan22.__all__)
    for name in wan22.__all__:
        value = getattr(wan22, name)
        assert getattr(value, "__name__", name) == name
        assert value.__doc__
    assert set(dir(wan22)) >= set(wan22.__all__)
    assert wan22.__version__.count(".") == 2


def test_an_unknown_name():
    with pytest.raises(
        AttributeError, match="module 'wan22' has no attribute 'WanPipelin'; it has WanT2VPipeline, "
    ):
        _ = wan22.WanPipelin
    with pytest.raises(ImportError):
        from wan22 import nothing  # noqa: F401


def test_unknown_embedded_checkpoint():
    with pytest.raises(ValueError, match="there is no embedded checkpoint 't3v'"):
        wan22.tiny_checkpoint("t3v")
