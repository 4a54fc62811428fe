"""The notebooks run, and what they are kept with is what they show."""

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"


def outputs(notebook):
    """All outputs but the bar that diffusers draws of loading, which is not kept."""
    found = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    return [o for o in found if not o.get("data", {}).get("text/plain", "").startswith("Loading pipeline")]


def texts(notebook):
    """What a notebook prints, cell by cell, without what a run brings by chance: addresses and times."""
    # A kernel sends what is printed in as many pieces as its timer makes of it.
    told = [
        "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    told += [o.data.get("text/plain", "") for o in outputs(notebook) if "data" in o]
    return [re.sub(r"0x[0-9a-f]+|\d[\d.e-]* s a step", "", text).strip() for text in told]


def pictures(notebook):
    return [o.data["image/png"] for o in outputs(notebook) if "image/png" in o.get("data", {})]


def players(notebook):
    return [
        o.data["text/html"] for o in outputs(notebook) if "<video" in o.get("data", {}).get("text/html", "")
    ]


def test_there_are_some():
    assert {"first_video", "image_to_video", "previews_and_recipes"} <= {path.stem for path in NOTEBOOKS}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_shows_what_it_is_kept_with(path, tmp_path):
    kept = nbformat.read(path, as_version=4)
    fresh = nbformat.from_dict(kept)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(fresh, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # an error in a cell is raised
    assert texts(fresh) == texts(kept)
    assert len(pictures(fresh)) == len(pictures(kept)) > 0
    assert len(players(fresh)) == len(players(kept)) > 0


def test_progress_is_drawn_as_widgets_which_are_kept():
    kept = nbformat.read(next(path for path in NOTEBOOKS if path.stem == "first_video"), as_version=4)
    views = [o.data[VIEW]["model_id"] for o in outputs(kept) if VIEW in o.get("data", {})]
    state = kept.metadata["widgets"][STATE]["state"]
    assert len(views) == 2
    assert {state[view]["model_name"] for view in views} == {"HBoxModel"}
    values = " ".join(str(model["state"].get("value")) for model in state.values())
    told = " ".join(values.split())  # tqdm sets figure spaces
    assert "sampling: 100%" in told and "20/20" in told and "low noise" in told


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_kept_small_and_tells_nothing_of_where_it_was_made(path):
    kept = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 400_000
    inside = [
        base64.b64decode(data) for html in players(kept) for data in re.findall(r"base64,([^\"]+)", html)
    ]
    inside += [path.read_bytes(), *map(base64.b64decode, pictures(kept))]
    for home in (b"/home/", b"/root", b"/tmp/", b"/work", b"site-packages"):
        assert not any(home in data for data in inside)
