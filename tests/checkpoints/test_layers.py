"""Which way the imports run within the package."""

import pytest

from tests.test_imports import MODULES, imported_modules

ORDER = ("files", "naming", "quantized_linear", "deferred", "lora", "loading", "converting", "preparing")
OWN = "wan22.checkpoints."


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(OWN)])
def test_imports_run_one_way(module):
    folder = module.removeprefix(OWN).split(".")[0]
    if folder == "__init__":
        return
    below = ORDER[: ORDER.index(folder)] if folder in ORDER else ORDER
    imported = {m.removeprefix(OWN).split(".")[0] for m in imported_modules(MODULES[module]) if OWN in m}
    assert imported <= {*below, folder}
