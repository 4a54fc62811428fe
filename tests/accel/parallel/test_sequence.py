"""Tokens shared among ranks: what one rank computes, in every layout; and nothing remains of it."""

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from diffusers.hooks import FirstBlockCacheConfig
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from tests.accel.parallel.ranks import on_ranks
from tests.builders import random_transformer
from tests.tiers import slow
from wan22.accel.parallel import Layout, parallelize
from wan22.accel.parallel.mesh import suggest
from wan22.models.attention import Kernel, native, register, unregister
from wan22.models.attention_guidance import AttentionGuidance

LAYOUTS = {2: [(2, 1), (1, 2)], 3: [(3, 1)], 4: [(4, 1), (2, 2)], 7: [(7, 1)]}
BOUND = 1e-5


def inputs(grid=(3, 6, 10), channels=16, times=None, seed=0):
    """Arguments of a transformer: 45 tokens, which neither 2, 4 nor 7 ranks share equally."""
    g = torch.Generator().manual_seed(seed)
    t, h, w = grid
    length = {None: 1, "frames": t, "tokens": t * (h // 2) * (w // 2)}[times]
    return {
        "hidden_states": torch.randn(1, channels, *grid, generator=g),
        "timestep": torch.rand(1, length, generator=g) * 1000,
        "encoder_hidden_states": torch.randn(1, 7, 32, generator=g),
    }


def cases():
    """Models with what they are given, by what is particular about it."""
    plain, image = random_transformer(0), random_transformer(1, image_dim=12, added_kv_proj_dim=48)
    rows = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(1))
    return {
        "one time": (plain, inputs()),
        "a time per frame": (plain, inputs(times="frames")),
        "a time per token": (plain, inputs(times="tokens")),
        "image rows": (image, inputs() | {"encoder_hidden_states_image": rows}),
        "fewer tokens than ranks": (plain, inputs(grid=(1, 2, 6))),
    }


def several(given):
    """Two samples that differ in all they have."""
    other = {name: 0.5 * value.flip(-1) for name, value in given.items()}
    return {name: torch.cat((value, other[name])) for name, value in given.items()}


def run(model, given):
    with torch.no_grad():
        return model(**given, return_dict=False)[0]


class Pipe:
    """What `parallelize` wants of a pipeline, around one transformer."""

    def __init__(self, model):
        self.transformers, self.any_transformer = [model], model
        self._execution_device = torch.device("cpu")
        self.ranks = self.parallel = self.memory_plan = None


def differences(rank, layouts):
    """Differences from one rank, by layout and case; and whether a detached model computes the same bits."""
    found = {}
    for name, (model, given) in cases().items():
        plain = run(model, given)
        for ring, ulysses in layouts:
            parallel = parallelize(Pipe(model), ring=ring, ulysses=ulysses, vae=False)
            found[ring, ulysses, name] = (run(model, given) - plain).abs().max().item()
            model.set_samples_in_turn()
            batch = several(given)
            one = torch.cat([run(model, {n: v[i : i + 1] for n, v in batch.items()}) for i in range(2)])
            found[ring, ulysses, name, "in turn"] = (run(model, batch) - one).abs().max().item()
            model.set_samples_in_turn(False)
            parallel.detach()
            found[ring, ulysses, name, "detached"] = 0.0 if torch.equal(run(model, given), plain) else 1.0
    return found


@pytest.mark.parametrize("count", [2, 4, *slow([3, 7])])
def test_a_transformer(count):
    for rank, found in enumerate(on_ranks(count, differences, LAYOUTS[count])):
        off = {case: value for case, value in found.items() if not value <= BOUND}
        assert not off, (rank, off)
        assert len(found) == len(LAYOUTS[count]) * 3 * len(cases())


def guided(rank):
    """How far what guidance asks of a transformer is off that of one rank. Outer layers are not skipped."""
    model, given = copy.deepcopy(random_transformer(0)), inputs()
    model.blocks.extend(random_transformer(1).blocks)
    negative = {"encoder_hidden_states_negative": given["encoder_hidden_states"].flip(-1)}
    given |= negative | {"attention_guidance": AttentionGuidance(4.0, 2.5, 0.5), "skip_layers": (1,)}
    plain, found = run(model, given), []
    for layout in ({"ring": 2}, {"ulysses": 2}):
        parallel = parallelize(Pipe(model), **layout, vae=False)
        found.append((run(model, given) - plain).abs().max().item())
        for layer in (0, 3):
            with pytest.raises(
                ValueError, match=f"layer {layer} cannot be skipped where ranks share tokens: lay"
            ):
                run(model, given | {"skip_layers": (1, layer)})
        found.append((run(model, given) - plain).abs().max().item())
        parallel.detach()
    assert run(model, given | {"skip_layers": (0, 3)}).isfinite().all()
    return found


def test_negative_texts_and_skipped_layers():
    for found in on_ranks(2, guided):
        assert len(found) == 4 and max(found) <= BOUND


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends to others, by what sends them."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "all_to_all_single" in name:
            x, _, splits, group = args
            group = group if isinstance(group, dist.ProcessGroup) else _resolve_process_group(group)
            to_others = sum(splits) - splits[dist.get_rank(group)]
            self.bytes["exchanged"] += x.nbytes * to_others // sum(splits)
        elif "allgather" in name:
            (outputs,), (x,) = args[:2]
            self.bytes["gathered"] += x.nbytes * (len(outputs) - 1)
        return func(*args, **(kwargs or {}))


def volumes(rank, layouts):
    """What one forward sends, by layout."""
    model, given = random_transformer(0), inputs(grid=(3, 8, 8))
    found = []
    for ring, ulysses in layouts:
        parallel = parallelize(Pipe(model), ring=ring, ulysses=ulysses, vae=False)
        with Sent() as sent:
            run(model, given)
        parallel.detach()
        found.append(dict(sent.bytes))
    return found


@pytest.mark.parametrize("count", [2, 4])
def test_what_is_sent(count):
    """The same by every rank. Per block: of queries, keys, values and results what is for other heads, and of
    keys and values all once to every other rank of the ring. At the end each token's velocity.
    """
    tokens, dim, layers, size = 48, 48, 2, 4
    own = tokens // count * dim * size  # bytes of one tensor of a rank's tokens
    velocity = tokens // count * 2 * 2 * 16 * size
    for found in on_ranks(count, volumes, LAYOUTS[count]):
        for (ring, ulysses), sent in zip(LAYOUTS[count], found, strict=True):
            exchanged = 4 * own * (ulysses - 1) // ulysses + 2 * own * (ring - 1)
            assert sent == {"exchanged": layers * exchanged, "gathered": velocity * (count - 1)}


def with_wrapped_layers(rank):
    """Differences from one rank where a LoRA, say, wraps the head's layers before and after ranks come."""
    found = []
    for first in (False, True):
        model, given = random_transformer(0), inputs(times="frames")
        plain = run(model, given)
        model.proj_out = model.proj_out if first else torch.nn.Sequential(model.proj_out)
        parallel = parallelize(Pipe(model), ulysses=2, vae=False)
        model.proj_out = torch.nn.Sequential(model.proj_out)
        found.append((run(model, given) - plain).abs().max().item())
        parallel.detach()
        assert torch.equal(run(model, given), plain)
    return found


def test_wrapped_layers():
    assert all(value <= BOUND for found in on_ranks(2, with_wrapped_layers) for value in found)


def refusals(rank):
    model = random_transformer(0)
    messages = []
    for layout in ({"ring": 3}, {"ulysses": 0}, {"ring": 2, "ulysses": 2.0}, {"cfg": 3}):
        with pytest.raises(ValueError, match=r"; say |nearest is") as error:
            parallelize(Pipe(model), **layout, vae=False)
        messages.append(str(error.value))
    plain = run(model, inputs())
    parallel = parallelize(Pipe(model), ulysses=2, vae=False)
    calls = []
    other = Kernel(lambda q, k, v: calls.append(q.shape) or native(q, k, v))
    register("another kernel", other)
    model.set_attention_backend("another kernel")
    messages.append((run(model, inputs()) - plain).abs().max().item())
    assert [tuple(shape[1:3]) for shape in calls] == [(46, 1), (23, 2)] * 2
    parallel.detach()
    assert {block.attn1.backend for block in model.blocks} == {"another kernel"}
    model.set_attention_backend("native")
    unregister("another kernel")
    pipe, cached = Pipe(model), random_transformer(0)
    cached.enable_cache(FirstBlockCacheConfig())
    pipe.transformers.append(cached)
    with pytest.raises(ValueError, match="a step cache is enabled"):
        parallelize(pipe, ulysses=2, vae=False)
    assert torch.equal(run(model, inputs()), plain), "nothing is shared by halves"
    cached.disable_cache()
    parallel = parallelize(Pipe(cached), ulysses=2, vae=False)
    cached.enable_cache(FirstBlockCacheConfig())  # since
    with pytest.raises(ValueError, match="a step cache is enabled"):
        run(cached, inputs())
    cached.disable_cache()
    run(cached, inputs())
    parallel.detach()
    return messages


def test_what_is_refused():
    for messages in on_ranks(2, refusals):
        assert messages[0].endswith("is 3 ranks, and there are 2; say ring=1, ulysses=2, cfg=1")
        assert "ulysses=0 must be an int, at least 1" in messages[1] and "ulysses=2.0" in messages[2]
        assert "cfg=3 must be an int, 1 to 2; the nearest is 2" in messages[3]
        assert messages[4] <= BOUND, "a kernel that was chosen since"


def test_heads_that_cannot_be_shared():
    message = "ulysses=4 cannot share 2 heads equally; say ring=2, ulysses=2, cfg=1"
    with pytest.raises(ValueError, match=message):
        Layout(1, 4).check(4, 2)


def test_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="start it with torchrun --nproc-per-node=2"):
        parallelize(Pipe(random_transformer(0)))


@pytest.mark.parametrize(
    ("ranks", "heads", "guided", "layout"),
    [
        (8, 40, True, (1, 4, 2)),
        (8, 40, False, (1, 8, 1)),
        (7, 40, True, (7, 1, 1)),
        (8, 24, False, (1, 8, 1)),
        (16, 24, False, (2, 8, 1)),
        (6, 40, True, (3, 1, 2)),
        (2, 40, True, (1, 1, 2)),
        (1, 12, True, (1, 1, 1)),
    ],
)
def test_the_layout_that_moves_the_least(ranks, heads, guided, layout):
    assert suggest(ranks, heads, guided) == Layout(*layout)
