"""Batches of an epoch: clips of one shape each, in an order that seed and epoch alone decide."""

import hashlib
from collections import defaultdict

from ...checks import check_positive_int
from .cached import CachedClips


def batches_of_epoch(
    clips: CachedClips, batch_size: int, seed: int, epoch: int, drop_last: bool = False
) -> list[list[int]]:
    """Return an epoch's batches, each the numbers of clips whose latents have one shape.

    Every clip is there as often as its `repeats` say. The order is that of hashes of seed, epoch and the
    names of the files: it is the same on every machine, in every version of Python, and after a resume.

    Args:
        clips: the encoded clips.
        batch_size: clips of a batch; the last batch of each shape may have fewer.
        seed: of the order.
        epoch: number of the epoch.
        drop_last: whether batches with fewer clips are left out.

    Raises: ValueError: batch_size is no number of clips, or no batch is left.
    """
    check_positive_int("batch_size", batch_size)

    def place(*parts: object) -> bytes:
        return hashlib.sha256("\0".join(map(str, (seed, epoch, *parts))).encode()).digest()

    # All clips once, those with repeats once more, and so on: few batches have a clip twice.
    shapes: dict[tuple[int, ...], list[tuple[int, bytes, int]]] = defaultdict(list)
    for index, item in enumerate(clips.items):
        shapes[item.shape] += [(i, place(item.file.name, i), index) for i in range(item.repeats)]
    batches: list[tuple[bytes, list[int]]] = []
    for placed in shapes.values():
        placed.sort()
        for start in range(0, len(placed), batch_size):
            batch = placed[start : start + batch_size]
            if len(batch) == batch_size or not drop_last:
                batches.append((place("batch", batch[0][1].hex()), [index for *_, index in batch]))
    if not batches:
        most = max(map(len, shapes.values()), default=0)
        raise ValueError(
            f"batch_size={batch_size} leaves no batch with drop_last; clips of one shape are {most} at most"
        )
    return [batch for _, batch in sorted(batches)]
