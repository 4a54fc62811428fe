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
FREE = {
    "checks",
    "devices",
    "downloads",
    "extras",
    "few_steps",
    "host_memory",
    "notebooks",
    "pictures",
    "progress",
    "web",
    "whole_files",
}
# What each part of the package may import from the others; it may always import from itself, and FREE.
MAY_IMPORT = {
    "checks": set(),
    "devices": set(),
    "downloads": set(),
    "extras": set(),
    "few_steps": set(),
    "notebooks": set(),
    "progress": set(),
    "whole_files": set(),
    "web": set(),
    "pictures": set(),
    "private_apis": set(),
    "host_memory": set(),
    "presets": set(),
    "assets": set(),
    "prompts": {"presets"},
    "guidance": {"pipelines"},
    "models": {"private_apis"},
    "schedulers": set(),
    "checkpoints": {"private_apis", "presets", "models"},
    "video": {"presets"},
    "accel": {"private_apis", "presets", "models", "checkpoints"},
    "pipelines": {
        "host_memory",
        "private_apis",
        "presets",
        "models",
        "schedulers",
        "checkpoints",
        "accel",
        "video",
    },
    "training": {
        *("private_apis", "presets", "models", "schedulers", "checkpoints", "accel", "pipelines", "video"),
    },
    "cli": {
        *("presets", "models", "schedulers", "checkpoints", "accel", "pipelines", "assets", "video"),
        "training",
    },
}
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {".".join(("wan22", *path.relative_to(ROOT).with_suffix("").parts)): path for path in FILES}


def part_of(module):
    return [*module.split("."), "__init__"][1]


def imported_modules(path, late=True):
    """Return the modules of this package that a file imports; `late`: inside functions, too."""
    tree = ast.parse(path.read_text())
    package = ("wan22", *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            # A name's own module, or the module that has the name.
            found |= {m for m in (name, name.rpartition(".")[0]) if m in MODULES}
    return found


def cycle_in(graph):
    """Return modules that import each other in a loop, or an empty list."""
    done = set()

    def visit(module, path):
        if module in path:
            return path[path.index(module) :]
        if module not in done:
            for other in sorted(graph[module]):
                if found := visit(other, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    part = part_of(module)
    if part == "__init__":
        return
    assert part in MAY_IMPORT, f"a new part {part}: say here what it may import"
    imported = {part_of(other) for other in imported_modules(MODULES[module])}
    assert imported <= MAY_IMPORT[part] | {part, *FREE}


def test_no_modules_import_each_other():
    assert cycle_in({module: imported_modules(path) for module, path in MODULES.items()}) == []


def test_the_walk_sees_imports():
    """Or the tests above could not fail."""
    assert {"wan22.pipelines.parts", "wan22.presets"} <= imported_modules(ROOT / "pipelines" / "base.py")
    assert "wan22.accel.planning.planner" in imported_modules(ROOT / "pipelines" / "attached" / "memory.py")
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]


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


def test_no_part_is_called_wan():
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


def test_a_pipeline_does_not_import_what_few_calls_need():
    """Conversion, planning, ranks, compilation, and pictures beside the frames load when they are used."""
    told = run("import sys, json, wan22; wan22.WanT2VPipeline; print(json.dumps(sorted(sys.modules)))")
    loaded = json.loads(told.stdout)
    assert "wan22.pipelines.t2v" in loaded
    late = ("accel.compile", "accel.parallel.attach", "accel.planning.planner", "checkpoints.converting")
    late += ("checkpoints.preparing.prepare", "video.grid", "video.sheets", "training", "cli")
    assert not [name for name in loaded if name.startswith(tuple(f"wan22.{part}" for part in late))]


def test_every_public_name_resolves():
    assert len(set(wan22.__all__)) == len(wan22.__all__)
    for name in wan22.__all__:
        value = getattr(wan22, name)
        assert getattr(value, "__name__", name) == name
        assert value.__doc__
    assert set(dir(wan22)) >= set(wan22.__all__)
    assert wan22.__version__.count(".") == 2


def test_subpackages_are_found_after_the_package():
    code = "import sys, wan22; assert 'wan22.presets' not in sys.modules; print(wan22.presets.T2V_A14B.name, "
    code += (
        "wan22.checkpoints.convert.__name__, wan22.accel.plan.__name__, wan22.prompts.TextPrompt.__name__)"
    )
    assert run(code).stdout.split() == ["Wan2.2-T2V-A14B", "convert", "plan", "TextPrompt"]
    assert {"accel", "checkpoints", "presets", "prompts"} <= set(dir(wan22))


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
