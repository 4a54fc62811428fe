"""The files of a model's folder in the Diffusers layout: what must be there, and what is read first."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ...checks import listed
from .safetensors import read_header
from .weights import check_places, shards_of

# Names of weights without their endings, and the endings: of diffusers' models, and of transformers'.
Names = Sequence[tuple[str, str]]
DIFFUSERS: Names = (("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin"))
TRANSFORMERS: Names = (("model", "safetensors"), ("pytorch_model", "bin"))


def names_of(names: Names, use_safetensors: bool | None) -> Names:
    """Return the names that diffusers' `use_safetensors` leaves: safetensors alone, or PyTorch's files."""
    if use_safetensors is None:
        return names
    return [(stem, suffix) for stem, suffix in names if (suffix == "safetensors") == use_safetensors]


def candidates(
    place: Path, variant: str | None = None, names: Names = DIFFUSERS
) -> Iterator[tuple[Path, list[Path]]]:
    """Yield what a folder's weights may be: a file, or an index and its shards; safetensors come first.

    `variant` is a part of the names, such as "fp16". An index counts if it is there.
    """
    ending = f".{variant}" if variant else ""
    for stem, suffix in names:
        index = place / f"{stem}.{suffix}.index{ending}.json"
        if index.is_file():
            yield index, [place / name for name in sorted(set(shards_of(index).values()))]
        else:
            yield place / f"{stem}{ending}.{suffix}", []


def weights_in(place: Path, variant: str | None = None, names: Names = DIFFUSERS) -> Path:
    """Return the weight file of a folder, or the index of its shards.

    A FileNotFoundError names the file or the shards that are missing, a ValueError a tensor that is not in
    the shard that the index says.
    """
    found = list(candidates(place, variant, names))
    for path, shards in found:
        if missing := [shard.name for shard in shards if not shard.is_file()]:
            count = f"{len(shards) - len(missing)} of {len(shards)} shards"
            raise FileNotFoundError(f"{place} has {count}; missing: {listed(missing, 9)}")
        if shards:
            _check_index(path)
        if path.is_file():
            return path
    others = sorted(file.name for file in place.iterdir()) if place.is_dir() else []
    raise FileNotFoundError(
        f"{place} has no weights: there is no {found[0][0].name}; found: {listed(others, 9) or 'nothing'}"
    )


def _check_index(index: Path) -> None:
    """Hold an index against its shards' headers, which loaders other than ours do not."""
    places = shards_of(index)
    names = {name for name in places.values() if name.endswith(".safetensors")}
    held = {name: read_header(index.parent / name)[0].keys() for name in names}
    check_places(index, {key: name for key, name in places.items() if name in names}, held)
