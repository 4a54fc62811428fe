"""Lets a pipeline's ranks make its videos together."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ...checkpoints.deferred import settle
from ...checkpoints.loading.dtypes import cast
from ...devices import free_and_total, has_own_memory
from ..offload.layout import bytes_of
from . import processes
from .mesh import Groups, Layout, gathered, suggest
from .rows import RowParallel
from .sequence import SequenceParallel
from .sharded import check, sharded

# Those whose weights fully_shard divides: all that is large.
TRANSFORMERS = ("transformer", "transformer_2")
DIVIDED = ("text_encoder", *TRANSFORMERS)
# Beyond this share of a GPU's memory, whole weights leave too little for what is computed with them.
MOST_WEIGHTS = 0.7
Value = TypeVar("Value")
Frame = TypeVar("Frame")


class Parallel:
    """A pipeline whose work is shared among ranks, until detached. `parallelize` describes the arguments.

    All ranks make the same calls, and each gets the video; the frames of `pipe.stream` go to the first one
    alone, though all must go through them. The first rank shows progress and previews, and writes what is
    saved; the others are silent, and their `save` writes nothing.

    Raises: ValueError: the layout does not suit, a step cache is enabled, the VAE is compiled, or weights
        cannot be divided.
    """

    def __init__(
        self,
        pipe: Any,
        layout: Layout,
        vae: bool = True,
        fsdp: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        layout.check(dist.get_world_size(), pipe.any_transformer.config.num_attention_heads)
        if pipe.parallel is not None:
            raise ValueError("the pipeline's work is shared already; call pipe.parallel.detach() first")
        whole = {n: model for n in DIVIDED if fsdp and (model := getattr(pipe, n, None)) is not None}
        for model in whole.values():
            check(model)
        if whole and pipe.memory.has_plan:
            raise ValueError("fsdp=True, and a plan moves the models; call pipe.release() first")
        for model in whole.values():
            settle(model)
        self.pipe, self.layout, self.fsdp, self.dtype = pipe, layout, fsdp, dtype
        self._before = pipe.ranks
        device = processes.own_device()
        self.device = device if fsdp else pipe._execution_device
        self.groups = Groups.of(layout, self.device.type)
        self._attached: list[SequenceParallel | RowParallel] = []
        self._rows: RowParallel | None = None
        self._sequence: SequenceParallel | None = None
        self._whole: dict[str, Any] = {}
        try:
            if vae:
                self._rows = RowParallel(pipe.vae, self.groups.all)
                self._attached.append(self._rows)
            for name, model in whole.items():
                self._whole[name] = model
                own = sharded(model, self.groups.mesh, dtype if name in TRANSFORMERS else None)
                setattr(pipe, name, own)
            for name, model in pipe.components.items() if whole else ():
                if isinstance(model, torch.nn.Module) and name not in whole:
                    model.to(device)
            if layout.ring * layout.ulysses > 1:
                self._sequence = SequenceParallel(pipe.transformers, self.groups)
                self._attached.append(self._sequence)
        except BaseException:  # all, or nothing
            self._let_go()
            raise
        self.first = dist.get_rank(self.groups.all) == 0
        pipe.ranks = self

    def detach(self) -> None:
        """Let each rank make videos of its own, as before; weights that were divided are on the CPU again."""
        if self.pipe is None:
            return
        self.pipe.ranks = self._before
        self._let_go()
        self.pipe = None

    @property
    def shares_rows(self) -> bool:
        """Whether the ranks share the VAE's rows."""
        return self._rows is not None

    @property
    def shares_passes(self) -> bool:
        """Whether ranks run different passes of a step that has two."""
        return self.layout.cfg > 1

    def check_whole(self) -> None:
        """Refuse what needs whole weights where each rank has a part of them."""
        if self.fsdp:
            raise ValueError(
                "each rank has only its part of the weights (fsdp=True): neither can they be moved or saved, "
                "nor given LoRAs or quantised; do that before, or call pipe.parallel.detach() first"
            )

    def __str__(self) -> str:
        shares = {"cfg": self.layout.cfg, "ring": self.layout.ring, "ulysses": self.layout.ulysses}
        told = [f"{name} {count}" for name, count in shares.items() if count > 1]
        told += [what for what, is_so in (("VAE rows", self.shares_rows), ("FSDP", self.fsdp)) if is_so]
        return f"{self.layout.ranks} ranks: {', '.join(told) or 'nothing shared'}"

    def _let_go(self) -> None:
        for attached in self._attached:
            attached.detach()
        for name, model in self._whole.items():
            setattr(self.pipe, name, model)
        if self.dtype is not None:
            for model in self.pipe.transformers:
                cast(model, self.dtype)
        if self._whole:
            for model in self.pipe.components.values():
                if isinstance(model, torch.nn.Module):
                    model.to("cpu")
        self._attached, self._whole = [], {}

    # ---- what the pipeline asks ----

    def agreed(self, value: Value) -> Value:
        """Return the first rank's value."""
        return processes.shared(value)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is set on any rank."""
        asked = torch.tensor(flags, device=self.device, dtype=torch.int32)
        dist.all_reduce(asked, dist.ReduceOp.MAX, self.groups.all)
        return tuple(asked.bool().tolist())

    def mean_over_tokens(self, values: torch.Tensor) -> float:
        """Return the mean of values "… l" of the blocks' tokens, of which ranks may have a part each."""
        return float(values.mean()) if self._sequence is None else self._sequence.mean(values)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums of all ranks' values."""
        values = values.to(self.device, torch.float32)
        dist.all_reduce(values, dist.ReduceOp.SUM, self.groups.all)
        return values

    def run_passes(
        self,
        passes: Mapping[str, Any],
        predict: Callable[[Mapping[str, Any]], list[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """Run the passes of a step; of each two, run one and get the other from the ranks that ran it."""
        names, shared = list(passes), self.layout.cfg
        if len(names) < shared or shared == 1:  # the same on all ranks
            return predict(passes)
        # Ranks that have a part of a block's weights each must all want that block.
        if self.fsdp and len({passes[name].skip_layers for name in names[:shared]}) > 1:
            return predict(passes)
        name = names[dist.get_rank(self.groups.guidance)]
        (own,) = predict({name: passes[name]})
        rest = {name: passes[name] for name in names[shared:]}
        return gathered(own, self.groups.guidance) + (self.run_passes(rest, predict) if rest else [])

    def frames_here(self, frames: Iterator[Frame], vae: Any) -> Iterator[Frame]:
        """Decode a stream's frames for the first rank; the others do their part, and have none."""
        if self._rows is None or vae.use_tiling:
            yield from frames if self.first else ()
            return
        while True:
            with self._rows.to_first():  # not while the caller has the frame
                frame = next(frames, None)
            if frame is None:
                return
            if self.first:
                yield frame


def parallelize(
    pipe: Any,
    *,
    ring: int | None = None,
    ulysses: int | None = None,
    cfg: int | None = None,
    fsdp: bool | None = None,
    vae: bool = True,
    dtype: torch.dtype | None = None,
) -> Parallel:
    """Let the ranks of torchrun make a pipeline's videos together.

    Load LoRAs and quantise before. A pipeline on the CPU goes to this rank's GPU, if there is one.

    Args:
        pipe: the pipeline.
        ring: ranks that pass keys and values around.
        ulysses: ranks that exchange tokens for heads, a divisor of the heads.
        cfg: 2: each pass of guidance runs on half of the ranks; 1: both run on all. Where none of the three
            is given it is the layout that moves the least, see `suggest`; where some are, the others are 1.
        fsdp: True: each rank keeps its part of the transformers' and the text encoder's weights, reads no
            more than that from their files, and a block's come together while it computes; False: all of
            them. None: True where a rank's GPU would be filled by more than 70 %.
        vae: whether the ranks share the VAE's rows, too.
        dtype: dtype of the transformers afterwards; None: as they are. Of divided ones each rank converts its
            part, where loading them in another dtype than their files' would convert the whole on every rank.

    Returns: the ranks, `pipe.parallel`; `detach()` undoes it.
    Raises: ValueError: this is no rank of several, they cannot be shared out so, or the weights cannot be
        divided; the message says how.
    """
    ranks = processes.join()
    if ring is ulysses is cfg is None:
        guided = pipe.preset.guidance_scale > 1
        layout = suggest(ranks, pipe.any_transformer.config.num_attention_heads, guided)
    else:
        given = {"ring": ring, "ulysses": ulysses, "cfg": cfg}
        layout = Layout(**{name: value for name, value in given.items() if value is not None})
    device = processes.own_device()
    on_the_way = has_own_memory(device) and pipe._execution_device.type == "cpu" and not pipe.memory.has_plan
    if fsdp is None:
        # One decides for all: their GPUs may have more or less room.
        fsdp = processes.shared(on_the_way and _fills(pipe, device, dtype))
    layout.check(ranks, pipe.any_transformer.config.num_attention_heads)
    if not fsdp:
        if dtype is not None:
            for model in pipe.transformers:
                cast(model, dtype)
        if on_the_way:
            pipe.to(device)
    return Parallel(pipe, layout, vae, fsdp, dtype if fsdp else None)


def _fills(pipe: Any, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether a pipeline's weights would leave too little of a GPU, its transformers in a dtype."""
    models: list[Any] = [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]
    nbytes = 0.0
    for model in models:
        converted = dtype if model in pipe.transformers else None
        nbytes += bytes_of(model) * (converted or model.dtype).itemsize / model.dtype.itemsize
    return nbytes > MOST_WEIGHTS * free_and_total(device)[0]
