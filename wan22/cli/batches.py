"""`wan22 batch`: many videos with one load; finished ones are skipped, failures are recorded."""

import hashlib
import json
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..accel.parallel.environment import is_first, launched
from ..checks import shown, unknown_argument
from ..pictures import is_url
from .checking import check_folder, check_loading
from .loading import find_model, load
from .options import Loading, Output, Saving, Target
from .reporting import INTERRUPTED, Result, fail, line_of, print_lines, say, warn
from .running import free_name, make
from .signatures import PIPELINES, call_arguments, python_only

if TYPE_CHECKING:
    from .loading import Pipeline

RECORD = "results.jsonl"
IMAGES = ("image", "last_image")

Item = dict[str, Any]


def run_batch(
    file: Path,
    folder: Path,
    ending: str,
    loading: Loading,
    saving: Saving,
    output: Output,
    dry_run: bool = False,
) -> None:
    """Make the videos of a file's items in a folder, and record each in its results.jsonl."""
    from ..video.writers import check_ending, check_quality

    check_ending(folder / f"video{ending}")
    check_quality(folder / f"video{ending}", saving.quality, saving.crf)
    items = read_items(file)
    check_folder(folder)
    task = _task(item for _, item in items)
    find_model(loading.model, task)
    if dry_run:
        say(f"{len(items)} items, of which the first takes:")
        _print_plan(task, _call(items[0][1], file), loading, output, folder / f"video{ending}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    finished = _finished(folder)
    todo = [(key, item) for key, item in items if key not in finished]
    if launched():
        from ..accel.parallel import processes

        processes.join()
        todo = processes.shared(todo)  # other ranks may see another folder, or see it later
    say(f"{len(items)} items, {len(items) - len(todo)} of them done already")
    failed = 0
    if todo:
        check_loading(task, loading)
        pipe = load(task, loading, output)
    for number, (key, item) in enumerate(todo, start=1):
        say(f"{number} of {len(todo)}: {item['prompt']}")
        start = time.perf_counter()
        record: dict[str, Any] = {"key": key, "item": item}
        fatal = False
        try:
            result = _make_item(pipe, item, file, folder, ending, saving)
            record |= {"status": "stopped" if result.stopped else "done", "files": result.files}
        except (OSError, ValueError, TypeError, FloatingPointError, MemoryError, RuntimeError) as error:
            # All ranks find what is wrong with an item; what may be wrong with one rank ends them all.
            fatal = launched() and not isinstance(error, ValueError | TypeError | FloatingPointError)
            record |= {"status": "failed", "error": line_of(error)}
            failed += 1
            warn(f"failed: {record['error']}")
        record["seconds"] = round(time.perf_counter() - start, 2)
        if is_first():
            with (folder / RECORD).open("a", encoding="utf-8", errors="backslashreplace") as records:
                records.write(json.dumps(record, ensure_ascii=False) + "\n")
        if fatal:
            fail(f"item {number} of {len(todo)}: {record['error']}", output.as_json, 1)
        if record["status"] == "stopped":
            warn("stopped; the same command goes on from here")
            raise typer.Exit(INTERRUPTED)
    _sum_up(len(items), failed, folder, output)


def _sum_up(items: int, failed: int, folder: Path, output: Output) -> None:
    """Print how many are done, and exit with 1 if some are not."""
    if is_first():
        done = items - failed
        summary = {"done": done, "failed": failed, "results": str(folder / RECORD)}
        print_lines(json.dumps(summary) if output.as_json else f"{done} done, {failed} failed: {folder}")
    if failed:
        raise typer.Exit(1)


def _make_item(pipe: "Pipeline", item: Item, file: Path, folder: Path, ending: str, saving: Saving) -> Result:
    """Make and save one item's video."""
    call, name = _call(item, file), item.get("name")
    words = "video" if saving.no_prompt else item["prompt"]
    target = free_name(words, folder, ending) if name is None else folder / f"{name}{ending}"
    count = call.get("num_videos_per_prompt", 1)
    return make(pipe, partial(pipe, **call), target, count, Target(overwrite=name is not None), saving)


def _call(item: Item, file: Path) -> dict[str, Any]:
    """Return an item's arguments of the call; its images are relative to the folder of the items' file."""
    call = {argument: value for argument, value in item.items() if argument != "name"}
    for argument in IMAGES:
        if isinstance(image := item.get(argument), str) and not is_url(image):
            call[argument] = str(file.parent / Path(image).expanduser())
    return call


def _print_plan(task: str, call: dict[str, Any], loading: Loading, output: Output, path: Path) -> None:
    """Print what the first item takes."""
    from .checking import check_all
    from .planning import print_plan

    print_plan(task, loading, check_all(task, call, loading, path, dry=True), output)


def read_items(file: Path) -> list[tuple[str, Item]]:
    """Return a file's items, each with a key of its own: one a line, in a .txt a prompt, else JSON.

    A ValueError names a line that is no item, or the second of two with one name; or there are none.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    items: list[tuple[str, Item]] = []
    seen: dict[str, int] = {}
    names: dict[str, int] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        item = {"prompt": line.strip()} if file.suffix == ".txt" else _parsed(line, f"{file}, line {number}")
        if (name := item.get("name")) is not None and names.setdefault(name, number) != number:
            raise ValueError(f"{file}, line {number}: the name {shown(name)} is line {names[name]}'s, too")
        digest = hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest()[:16]
        seen[digest] = seen.get(digest, 0) + 1  # the same line twice is two videos
        items.append((f"{digest}-{seen[digest]}", item))
    if not items:
        raise ValueError(f"{file} has no items")
    return items


def _parsed(line: str, where: str) -> Item:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}; for plain prompts name the file .txt") from error
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        raise ValueError(f'{where}: an item is {{"prompt": "…"}} with further arguments of the call')
    known = {"name"}.union(*map(call_arguments, PIPELINES))
    if fixed := sorted(item.keys() & set(python_only())):
        rule = "is for calls in Python; the videos of a batch are files, whose format --ending says"
        raise ValueError(f"{where}: {fixed[0]} {rule}")
    if unknown := sorted(item.keys() - known):
        raise ValueError(f"{unknown_argument(where, unknown[0], known)}")
    if (name := item.get("name")) is not None and (not isinstance(name, str) or Path(name).name != name):
        raise ValueError(f"{where}: name={shown(name)} must be a file's name without folders and ending")
    return item


def _task(items: Iterable[Item]) -> str:
    """Return the first task whose pipeline takes all of the items' arguments."""
    used = {name for item in items for name, value in item.items() if value is not None} - {"name"}
    return next(task for task in PIPELINES if used <= call_arguments(task).keys())


def _finished(folder: Path) -> set[str]:
    """Return the keys of the items whose videos are there."""
    file = folder / RECORD
    if not file.is_file():
        return set()
    finished = set()
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a killed run's last line
            continue
        # By their names only: the folder's path may be another from here.
        files = [folder / Path(path).name for path in record.get("files", ())]
        if record["status"] == "done" and all(file.exists() for file in files):
            finished.add(record["key"])
    return finished
