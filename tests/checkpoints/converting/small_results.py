"""Small results that take all ways of writing, and what writes them as the converter does."""

import os
import shutil
from pathlib import Path

import torch

from wan22.checkpoints.converting import writing
from wan22.checkpoints.converting.plan import OutputTensor
from wan22.checkpoints.converting.unfinished import Unfinished
from wan22.checkpoints.converting.writing import write_plan

REQUEST = {"source": {"path": "somewhere"}, "to": "diffusers", "shard_size": 4000}
FORMS = ("folder", "single")


def tensors(count):
    values = [torch.arange(1000.0) + i for i in range(count)]
    return [OutputTensor("vae", f"t{i}", f"t{i}", f"t{i}", t, t.dtype) for i, t in enumerate(values)]


def target_of(form, place):
    return place / ("out" if form == "folder" else "out.safetensors")


def write(work, form, request=REQUEST):
    """What convert does."""
    plans, place = work
    with Unfinished(target_of(form, place), request, single=form == "single") as unfinished:
        if unfinished.placed:
            unfinished.clear()
            return
        write_plan(plans[form], unfinished, "")
        unfinished.place()


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}


# What is done to files, each of which a kill may precede.
_OF_OS = ("open", "write", "fsync", "ftruncate", "rename", "replace", "link", "unlink", "mkdir", "rmdir")
EVENTS = [(os, name) for name in _OF_OS]
EVENTS += [(writing, "write_safetensors"), (torch, "save"), (shutil, "copyfile"), (Path, "write_text")]
