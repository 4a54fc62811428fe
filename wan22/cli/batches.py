"""Many videos with one load: what is done is skipped, what fails is recorded, and the rest goes on."""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from ..accel.parallel.environment import is_first, launched
from .running import INTERRUPTED, LOADING, fail, line_of, load, make, name_of, say

RECORD = "results.jsonl"
IMAGES = ("image", "last_image")


def run_batch(file: Path, folder: Path, ending: str, options: Mapping[str, Any]) -> None:
    """Make the videos of a file's items, and record each in the folder's results.jsonl.

    Args:
        file: one item a line: JSON with the call's arguments and `name`; or, in a .txt, a prompt.
        folder: for the videos.
        ending: of their names.
        options: those named in LOADING and the ones about saving.

    Raises:
        ValueError: a line is no item, or the ending is none of a video's.
    """
    from ..video.writers import check_ending, check_quality

    check_ending(folder / f"video{ending}")
    check_quality(folder / f"video{ending}", options.get("quality"), options.get("crf"))
    items = read_items(file)
    folder.mkdir(parents=True, exist_ok=True)
    done = _done(folder)
    todo = [(key, item) for key, item in items if key not in done]
    if launched():
        from ..accel.parallel import processes

        processes.join()
        todo = processes.shared(todo)  # the others may see another folder, or see it later
    quiet, as_json = options["quiet"], options["as_json"]
    say(f"{len(items)} items, {len(items) - len(todo)} of them done already", quiet)
    saving = {name: options.get(name) for name in ("quality", "crf", "contact_sheet")}
    task = "i2v" if any(item.get("image") is not None for _, item in items) else "t2v"
    pipe = load(task, {name: options.get(name) for name in LOADING}, quiet) if todo else None
    failed = []
    for number, (key, item) in enumerate(todo, start=1):
        say(f"{number} of {len(todo)}: {item['prompt']}", quiet)
        start = time.perf_counter()
        record: dict[str, Any] = {"key": key, "item": item}
        stopped = fatal = False
        try:
            call = {name: value for name, value in item.items() if name != "name"}
            call |= {n: _beside(file, call[n]) for n in IMAGES if call.get(n) is not None}
            target = (
                folder / f"{item['name']}{ending}"
                if "name" in item
                else name_of(item["prompt"], folder, ending)
            )
            result = make(pipe, call, target, {**saving, "overwrite": "name" in item})
            stopped = result.stopped
            record |= {"status": "stopped" if stopped else "done", "files": result.files}
        except (OSError, ValueError, TypeError, FloatingPointError, MemoryError, RuntimeError) as error:
            # What is wrong with an item, all ranks find; what may be wrong with one of them ends them all.
            fatal = launched() and not isinstance(error, ValueError | TypeError | FloatingPointError)
            record |= {"status": "failed", "error": line_of(error)}
            failed.append(record)
            say(f"failed: {record['error']}")
        record["seconds"] = round(time.perf_counter() - start, 2)
        if is_first():
            with (folder / RECORD).open("a") as records:
                records.write(json.dumps(record, ensure_ascii=False) + "\n")
        if fatal:
            fail(f"item {number} of {len(todo)}: {record['error']}", as_json, 1)
        if stopped:
            say("stopped; the same command goes on from here")
            raise typer.Exit(INTERRUPTED)
    if not is_first():
        raise typer.Exit(1 if failed else 0)
    summary = {"done": len(items) - len(failed), "failed": len(failed), "results": str(folder / RECORD)}
    print(json.dumps(summary) if as_json else f"{summary['done']} done, {summary['failed']} failed: {folder}")
    if failed:
        raise typer.Exit(1)


def read_items(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return a file's items, each with a key that is its own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no item, or two have one name; the line is named.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    items: list[tuple[str, dict[str, Any]]] = []
    seen: dict[str, int] = {}
    names: dict[str, int] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        item = {"prompt": line.strip()} if file.suffix == ".txt" else _parsed(line, file, number)
        if (name := item.get("name")) is not None and names.setdefault(name, number) != number:
            raise ValueError(f"{file}, line {number}: the name {name!r} is line {names[name]}'s, too")
        digest = hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest()[:16]
        seen[digest] = seen.get(digest, 0) + 1  # the same line twice is two videos
        items.append((f"{digest}-{seen[digest]}", item))
    return items


def _parsed(line: str, file: Path, number: int) -> dict[str, Any]:
    from ..pipelines.i2v import WanI2VPipeline

    where = f"{file}, line {number}"
    try:
        item = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}; for plain prompts name the file .txt") from error
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        raise ValueError(f'{where}: an item is {{"prompt": "…"}} with further arguments of the call')
    known = set(WanI2VPipeline.__call__.__annotations__) | {"name"}
    if unknown := sorted(item.keys() - known):
        raise ValueError(f"{where}: there is no argument {unknown[0]!r}")
    if (name := item.get("name")) is not None and (not isinstance(name, str) or Path(name).name != name):
        raise ValueError(f"{where}: name={name!r} must be a file's name without folders and ending")
    return item


def _done(folder: Path) -> set[str]:
    """Return the keys of the items whose videos are there."""
    file = folder / RECORD
    if not file.is_file():
        return set()
    done = set()
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the run ended while it wrote this
            continue
        # By their names: the folder may be called otherwise from here.
        files = [folder / Path(path).name for path in record.get("files", ())]
        if record["status"] == "done" and all(file.exists() for file in files):
            done.add(record["key"])
    return done


def _beside(file: Path, image: str) -> str:
    """Return an image's path, which counts from where the items' file is."""
    if image.startswith(("http://", "https://")):
        return image
    return str(file.parent / Path(image).expanduser())
