"""Private names of other libraries are touched in one file, and pyproject.toml caps those libraries."""

import ast
import re
from pathlib import Path

import pytest

import wan22
from wan22 import private_apis

ROOT = Path(wan22.__file__).parent
FILES = sorted(set(ROOT.rglob("*.py")) - {Path(private_apis.__file__)})
# What PyTorch, diffusers and transformers have subclasses set or read, or tell users to.
FOR_SUBCLASSES = {
    "_apply",
    "_callback_tensor_inputs",
    "_execution_device",
    "_exit",  # os's
    "_interrupt",
    "_keep_in_fp32_modules",
    "_no_split_modules",
    "_optional_components",
    "_progress_bar_config",
    "_repeated_blocks",
    "_save_to_state_dict",
}
READERS = {"attrgetter", "delattr", "getattr", "hasattr", "setattr"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def own_names():
    """Return the private names that wan22 itself gives to anything."""
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                found.add(node.attr)
    return found


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def of_others(source, own=frozenset()):
    """Return the private names of other libraries in a file: imported, or read from an object."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if any(map(is_private, alias.name.split(".")))}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if any(map(is_private, name.split(".")))}
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if not is_self(node.value) and node.attr not in own | FOR_SUBCLASSES:
                found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in READERS:
            words = {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
            found |= {word for word in words if is_private(word)} - own - FOR_SUBCLASSES
    return found


def test_private_names_of_others_are_in_one_file():
    own = own_names()
    found = {str(path.relative_to(ROOT)): of_others(path.read_text(), own) for path in FILES}
    assert not {path: names for path, names in found.items() if names}, "private_apis.py is the place"


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo.callback",
        "from torch.distributed import _functional_collectives",
        "from diffusers.hooks._helpers import TransformerBlockRegistry",
        "torch._scaled_mm(a, b)",
        "torch.ops.aten._scaled_dot_product_attention_math(q, k, v)",
        "tensor._version",
        "getattr(model, '_orig_mod', model)",
    ],
)
def test_a_private_name_is_found(line):
    assert of_others(line)


def test_public_and_own_names_are_not():
    source = "from ._own import x\nimport torch.nn\nself._handles\npipe._mine\nsuper().__init__()"
    assert not of_others(source, {"_mine"})


def test_every_name_is_used_and_explained():
    source = Path(private_apis.__file__).read_text()
    everything = "".join(path.read_text() for path in FILES)
    tree = ast.parse(source)
    assigned = [target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert all(ast.get_docstring(node) for node in functions)
    for name in (*assigned, *(node.name for node in functions)):
        assert name in everything, f"{name} has no use any more"


@pytest.mark.parametrize("library", ["torch", "diffusers", "accelerate"])
def test_libraries_with_private_names_are_capped(library):
    requirement = re.search(rf'"{library}>=.*"', (ROOT.parent / "pyproject.toml").read_text())
    assert requirement is not None
    assert ",<" in requirement[0]
