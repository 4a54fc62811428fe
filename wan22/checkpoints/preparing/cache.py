"""Where prepared models are, and whether there is one of a model in a file.

A folder holds one model in the Diffusers layout, and is named after all that its weights depend on: kind of
model, form, configuration, and what identifies the source's files. So a prepared model of files that have
changed since is never taken for theirs, and one of files that were only moved or renamed is found.
"""

import hashlib
import json
import logging
import os
import re
from pathlib import Path

from huggingface_hub import constants

from ...checks import as_path
from ..files.fingerprint import fingerprint
from ..files.weights import read_json
from ..loading.recognize import read_model
from ..loading.stored import StoredModel

logger = logging.getLogger(__name__)

# "bf16": as a load in bfloat16 gives it; "fp8": a transformer as wan22.accel.quantize then makes it of that.
FORMS = ("bf16", "fp8")
# VAE and image encoder are small, and better left in float32.
_KINDS = ("transformer", "text_encoder")
RECORD = "prepared.json"  # in the folder: what it was made of, and the sizes of its files
# Counts up when the same source gives other weights, as when other parts of a model are kept in float32.
_VERSION = 1
_HASH = re.compile(r"[0-9a-f]{64}")


def is_preparable(stored: StoredModel, form: str) -> bool:
    """Return whether a model is in a file and plain, and a load would convert most of it."""
    if stored.kind not in _KINDS or not stored.paths or "quantised" in stored.sizes:
        return False
    return form == "fp8" or stored.sizes.most_common(1)[0][0] != "bfloat16"


def cache_folder() -> Path:
    """Return the folder of prepared models: in `$WAN22_CACHE`, or the assets of Hugging Face's cache."""
    place = os.environ.get("WAN22_CACHE") or Path(constants.HF_ASSETS_CACHE, "wan22")
    return as_path(place).absolute() / "prepared"


def folder_of(stored: StoredModel, form: str) -> Path:
    """Return the folder of a model's prepared form, whether it is there or not."""
    facts = {
        "version": _VERSION,
        "kind": stored.kind,
        "form": form,
        "config": stored.config,
        "files": sorted(_identity(path) for path in stored.paths),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder() / f"{stored.kind}-{form}-{digest[:24]}"


def _identity(path: Path) -> tuple[int, str, str]:
    """Return what tells a file from any other; of values that are alike elsewhere, when they were written."""
    path = path.resolve()
    stat = path.stat()
    # The hub's cache names files after their contents, and a file may be downloaded again.
    hashed = path.parent.name == "blobs" and _HASH.fullmatch(path.name)
    return stat.st_size, path.name if hashed else str(stat.st_mtime_ns), fingerprint(path)


def find_prepared(stored: StoredModel, form: str) -> StoredModel | None:
    """Return the prepared form of a model; None if it is not there, with a warning if it is damaged."""
    if not stored.paths:
        return None
    try:
        if not any(cache_folder().glob(f"{stored.kind}-{form}-*")):
            return None  # before samples are read all over the source
        folder = folder_of(stored, form)
        if not folder.is_dir():
            return None
    except OSError:  # a cache that cannot be read holds nothing
        return None
    if (damage := _damage(folder)) is not None:
        logger.warning("%s is not used: %s; delete the folder, and prepare again", folder, damage)
        return None
    return read_model(folder, stored.kind)


def _damage(folder: Path) -> str | None:
    try:
        sizes = read_json(folder / RECORD).get("files")
    except ValueError as error:
        return str(error)
    if not isinstance(sizes, dict) or not sizes:
        return f"it has no {RECORD}"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None
