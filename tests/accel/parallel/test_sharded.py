"""Weights divided among ranks: each has, and reads, its part alone; they compute what whole ones do."""

import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.accel.parallel.ranks import on_ranks
from tests.accel.parallel.test_sequence import inputs, run
from tests.builders import SMALL, bf16_pipeline, random_pipeline, random_text_encoder, random_transformer
from tests.tiers import slow
from wan22 import WanT2VPipeline, WanTransformer3DModel
from wan22.accel.offload.layout import blocks_of
from wan22.accel.parallel import parallelize
from wan22.accel.parallel.sharded import sharded


def mesh_of_all():
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def encode(model):
    with torch.no_grad():
        return model(torch.arange(1, 20)[None]).last_hidden_state


def own_bytes(model):
    return sum(parameter.to_local().nbytes for parameter in model.parameters())


def comparisons(rank, folder):
    """For each model: whether divided weights compute the same bits, and this rank's share of them."""
    half = WanTransformer3DModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.blocks[0].parameters()} == {torch.bfloat16, torch.float32}
    found, rows = [], torch.ones(1, 7, 32, dtype=torch.bfloat16)
    for model, compute in (
        (random_transformer(0), lambda model: run(model, inputs())),
        (
            half,
            lambda model: run(model, inputs() | {"encoder_hidden_states": rows}),
        ),
        (random_text_encoder(1), encode),
    ):
        part = sharded(model, mesh_of_all())
        expected = compute(model)
        same = all(torch.equal(compute(part), expected) for _ in range(2))
        whole = sum(parameter.nbytes for parameter in model.parameters())
        found.append((same, own_bytes(part) / whole))
        assert all(isinstance(parameter, DTensor) for parameter in part.parameters())
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return found


@pytest.mark.parametrize("count", [2, *slow([3])])
def test_what_is_computed(count, tmp_path):
    random_transformer(0).save_pretrained(tmp_path)
    results = on_ranks(count, comparisons, str(tmp_path))
    for found in results:
        assert all(same for same, _ in found)
    for shares in zip(*([share for _, share in found] for found in results), strict=True):
        assert sum(shares) == pytest.approx(1)
        # What has no more rows than there are ranks, a block's modulation say, is on some of them only.
        assert max(shares) <= 1.1 / count


def whole_blocks(rank):
    """The most blocks that are together at a time while a transformer runs, and after it."""
    model = sharded(random_transformer(0), mesh_of_all())
    blocks = blocks_of(model)

    def together():
        return sum(not isinstance(block.attn1.to_q.weight, DTensor) for block in blocks)

    seen = []
    for block in blocks:
        block.ffn.register_forward_hook(lambda *_: seen.append(together()))
    run(model, inputs())
    return max(seen), together()


def test_blocks_come_together_one_by_one():
    assert on_ranks(2, whole_blocks) == [(1, 0), (1, 0)]


def mapped_bytes(file):
    """Bytes of a file that this process has in memory."""
    found, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            counts = line.endswith(str(file))
        elif counts and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def reading(rank, folder):
    """What this rank has of the file, in bytes: once loaded, and once divided."""
    file = Path(folder, "diffusion_pytorch_model.safetensors")
    pipe = random_pipeline(experts=1, transformer=WanTransformer3DModel.from_pretrained(folder))
    loaded = mapped_bytes(file)
    parallel = parallelize(pipe, cfg=2, fsdp=True)
    divided = mapped_bytes(file)
    assert parallel.fsdp and own_bytes(pipe.transformer) <= 0.51 * file.stat().st_size
    whole = parallel.pipe, pipe.transformer
    parallel.detach()
    assert pipe.transformer is not whole[1] and not isinstance(next(pipe.transformer.parameters()), DTensor)
    return loaded, divided


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_each_rank_reads_its_part(tmp_path):
    model = WanTransformer3DModel(
        num_attention_heads=8, attention_head_dim=128, text_dim=32, ffn_dim=16384, num_layers=1
    )
    model.save_pretrained(tmp_path)
    size = (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size > 100 * 2**20
    for loaded, divided in on_ranks(2, reading, str(tmp_path)):
        assert loaded <= 0.05 * size  # the header, and what shares its pages
        # The kernel maps up to 2 MiB around what is read, of each of the ten matrices.
        assert 0.4 * size <= divided <= 0.5 * size + 30 * 2**20


def conversions(rank, folder):
    """A checkpoint stored in float32 and asked for in bf16: the dtypes, and what is computed."""
    call = SMALL | {"prompt": "a red kite", "seed": 1, "output_type": "latent"}
    alone = WanT2VPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    expected = alone(**call).frames
    found = []
    monkeypatch = pytest.MonkeyPatch()
    for name, value in (("RANK", rank), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    for fsdp in (False, True):
        shares = {"cfg": 2, "fsdp": fsdp}
        pipe = WanT2VPipeline.from_pretrained(folder, dtype=torch.bfloat16, parallel=shares)
        dtypes = {name: parameter.dtype for name, parameter in pipe.transformer_2.named_parameters()}
        assert dtypes == {name: p.dtype for name, p in alone.transformer_2.named_parameters()}
        assert pipe.text_encoder.dtype == pipe.vae.dtype == torch.bfloat16
        if fsdp:  # what was loaded is as in the file
            assert {p.dtype for p in pipe.parallel._whole["transformer"].parameters()} == {torch.float32}
        found.append(torch.equal(pipe(**call).frames, expected))
        pipe.parallel.detach()
        found.append(torch.equal(pipe(**call).frames, expected))
    return found


def test_each_rank_converts_its_part(tmp_path):
    random_pipeline().save_pretrained(tmp_path)
    assert on_ranks(2, conversions, str(tmp_path)) == [[True] * 4] * 2


def refusals(rank):
    pipe = bf16_pipeline()
    pipe.quantize("int8")
    whole = pipe.transformer
    with pytest.raises(ValueError, match="cannot divide the quantised weights of WanTransformer3DModel"):
        parallelize(pipe, ulysses=2, fsdp=True)
    assert pipe.transformer is whole and pipe.parallel is None
    model = random_transformer(0).to("meta")  # as good as a GPU: not the CPU
    with pytest.raises(ValueError, match="have left it; call it before"):
        sharded(model, mesh_of_all())


def test_what_is_refused():
    on_ranks(2, refusals)
