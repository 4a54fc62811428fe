"""Prepared models: what a load gives, found again, never another's, whole or not there."""

import errno
import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel as DiffusersTransformer
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from tests.builders import random_text_encoder, random_transformer
from tests.checkpoints.converting.test_convert import anonymous_memory
from tests.golden_data import golden
from wan22.accel.quantize import quantize
from wan22.checkpoints.converting import writing
from wan22.checkpoints.files import safetensors
from wan22.checkpoints.loading.alignment import CPU_ALIGNMENT
from wan22.checkpoints.loading.models import WanTransformer3DModel
from wan22.checkpoints.loading.recognize import read_model
from wan22.checkpoints.preparing import prepare as module
from wan22.checkpoints.preparing.cache import _VERSION, RECORD, find_prepared
from wan22.checkpoints.preparing.prepare import preparations, prepare

BF16 = torch.bfloat16


@pytest.fixture
def source(tmp_path):
    """A transformer's folder, in float32 and one file."""
    random_transformer(1).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def weights(model):
    """Names, dtypes and bytes of all that a model stores, its bytes in float8, too."""
    return {
        name: (t.dtype, t.shape, t.contiguous().view(torch.uint8)) for name, t in model.state_dict().items()
    }


def assert_equal(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, (dtype, shape, data) in other.items():
        assert one[name][:2] == (dtype, shape), name
        assert torch.equal(one[name][2], data), name


def prepared(folder, form="bf16", kind=None):
    """Prepare one model, and return it as it is found afterwards."""
    stored = read_model(folder, kind)
    (part,) = preparations({stored.kind: stored}, form)
    prepare([part])
    found = find_prepared(read_model(folder, kind), form if stored.kind == "transformer" else "bf16")
    assert found is not None and found.paths[0].parent == part.folder
    return found


def test_a_transformer_is_what_a_load_converts_it_to(source, cache):
    found = prepared(source)
    plain = read_model(source).load(BF16)
    assert_equal(found.load(BF16), plain)
    assert_equal(found.load(), plain)
    assert {t.dtype for t in plain.state_dict().values()} == {BF16, torch.float32}, "some stay in float32"
    assert found.load(BF16).config.items() >= {n: v for n, v in plain.config.items() if n[0] != "_"}.items()


def test_what_the_version_stands_for():
    """Whoever changes what is kept in float32 counts the version up, or old files would be taken for new."""
    kept = ("patch_embedding", "time_embedder", "time_proj", "scale_shift_table", "proj_out")
    kept += ("norm1", "norm2", "norm3", "norm_q", "norm_k", "norm_added_k")
    assert (_VERSION, tuple(WanTransformer3DModel._keep_in_fp32_modules)) == (1, kept)


def test_float8_is_what_quantize_gives(source, cache):
    found = prepared(source, "fp8")
    plain = quantize(read_model(source).load(BF16), "fp8")
    assert_equal(found.load(BF16), plain)
    latents, text = torch.randn(1, 16, 2, 4, 4, dtype=BF16), torch.randn(1, 5, 32, dtype=BF16)
    inputs = {"hidden_states": latents, "encoder_hidden_states": text, "timestep": torch.tensor([500.0])}
    with torch.no_grad():
        one, other = (model(**inputs, return_dict=False)[0] for model in (found.load(BF16), plain))
    assert torch.equal(one, other)


def test_float8_of_a_file_in_bfloat16(tmp_path, cache):
    random_transformer(1).to(BF16).save_pretrained(tmp_path / "half")
    assert_equal(
        prepared(tmp_path / "half", "fp8").load(BF16),
        quantize(read_model(tmp_path / "half").load(BF16), "fp8"),
    )


@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_a_text_encoder_is_in_bfloat16(form, tmp_path, cache):
    random_text_encoder(1).save_pretrained(tmp_path / "t5")
    found = prepared(tmp_path / "t5", form)
    plain = UMT5EncoderModel.from_pretrained(tmp_path / "t5", dtype=BF16)
    assert_equal(found.load(BF16), plain)
    assert_equal(UMT5EncoderModel.from_pretrained(found.paths[0].parent), plain)


def test_other_libraries_read_it(source, cache):
    found = prepared(source)
    model = DiffusersTransformer.from_pretrained(found.paths[0].parent, torch_dtype=BF16)
    assert torch.equal(
        model.blocks[0].attn1.to_q.weight, read_model(source).load(BF16).blocks[0].attn1.to_q.weight
    )


def test_official_names_and_pth(tmp_path, cache):
    """A source in another layout is prepared under the model's own names."""
    torch.save(golden("t5").weights, tmp_path / "t5.pth")
    assert_equal(prepared(tmp_path / "t5.pth").load(BF16), read_model(tmp_path / "t5.pth").load(BF16))


def test_it_is_mapped_and_aligned(tmp_path, cache):
    """Weights of whole multiples of 64 bytes need no copy on the CPU."""
    random_transformer(1).save_pretrained(tmp_path / "source")
    model = prepared(tmp_path / "source").load()
    aligned = [p for p in model.parameters() if p.nbytes % CPU_ALIGNMENT == 0]
    assert len(aligned) > 20
    assert not [p.shape for p in aligned if p.data_ptr() % CPU_ALIGNMENT]
    maps = Path("/proc/self/maps")
    if maps.exists():
        mapped = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(cache) in line]
        inside = [any(int(a, 16) <= p.data_ptr() < int(b, 16) for a, b in mapped) for p in aligned]
        assert all(inside)


# ---- whose it is ----


def test_a_changed_source_is_another(source, cache):
    prepared(source)
    path = source / "diffusion_pytorch_model.safetensors"
    data, times = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1  # where no sample may be taken
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert find_prepared(read_model(source), "bf16") is None
    path.unlink()
    random_transformer(2).save_pretrained(source)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert find_prepared(read_model(source), "bf16") is None, "other values under the same name and time"


def test_an_empty_cache_costs_no_reading(source, cache, monkeypatch):
    def fingerprint(path):
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("wan22.checkpoints.preparing.cache.fingerprint", fingerprint)
    assert find_prepared(read_model(source), "bf16") is None
    with pytest.raises(AssertionError, match="was read"):
        (cache / "transformer-bf16-0").mkdir(parents=True)
        find_prepared(read_model(source), "bf16")


def test_another_configuration_is_another(source, cache):
    prepared(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eps": 1e-5}))
    assert find_prepared(read_model(source), "bf16") is None


def test_a_moved_source_is_the_same(source, tmp_path, cache):
    found = prepared(source)
    source.rename(tmp_path / "elsewhere")
    assert find_prepared(read_model(tmp_path / "elsewhere"), "bf16").source == found.source


def test_a_blob_of_the_hub_is_known_by_its_name(tmp_path, cache):
    random_transformer(1).save_pretrained(tmp_path / "plain")
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    (tmp_path / "plain/diffusion_pytorch_model.safetensors").rename(blob)
    (tmp_path / "plain/diffusion_pytorch_model.safetensors").symlink_to(blob)
    found = prepared(tmp_path / "plain")
    os.utime(blob, ns=(1, 1))  # downloaded again
    assert find_prepared(read_model(tmp_path / "plain"), "bf16").source == found.source


def test_what_needs_no_preparing(tmp_path, cache):
    random_transformer(1).to(BF16).save_pretrained(tmp_path / "half")
    quantized = {"blocks.0.attn1.to_q.weight"}
    table = load_file(tmp_path / "half/diffusion_pytorch_model.safetensors")
    table = {n: t.to(torch.float8_e4m3fn) if n in quantized else t.float() for n, t in table.items()}
    shutil.copytree(tmp_path / "half", tmp_path / "mixed")
    save_file(table, tmp_path / "mixed/diffusion_pytorch_model.safetensors")
    assert preparations({"transformer": read_model(tmp_path / "half")}, "bf16") == []
    for form in ("bf16", "fp8"):
        assert preparations({"transformer": read_model(tmp_path / "mixed")}, form) == []
    with pytest.raises(ValueError, match="prepare='fp16' must be one of 'bf16', 'fp8'; the nearest is 'b"):
        preparations({}, "fp16")


# ---- whole, or not there ----


def part_of(source, form="bf16"):
    (part,) = preparations({"transformer": read_model(source)}, form)
    return part


@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_an_interrupted_call_goes_on(form, source, cache, monkeypatch):
    monkeypatch.setattr(module, "SHARD_SIZE", 20_000)
    part, written, write = part_of(source, form), [], writing.write_safetensors
    count = len(part.plan.files)
    assert count > 3

    def stop(path, tensors):
        written.append(path)
        if len(written) == count - 1:
            raise KeyboardInterrupt
        write(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_safetensors", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare([part])
    assert not part.folder.exists() and find_prepared(read_model(source), form) is None
    kept = {p.name: p.stat().st_ino for p in part.unfinished.folder.glob("*.safetensors")}
    assert len(kept) == count - 2
    again = part_of(source, form)
    assert again.nbytes_left < part.plan.nbytes
    prepare([again])
    assert {name: (part.folder / name).stat().st_ino for name in kept} == kept, "nothing is written twice"
    assert [path.name for path in cache.iterdir()] == [part.folder.name]
    plain = read_model(source).load(BF16)
    assert_equal(
        find_prepared(read_model(source), form).load(BF16), quantize(plain, "fp8") if form == "fp8" else plain
    )


def test_scales_whose_weight_an_earlier_call_has_written(source, cache, monkeypatch):
    monkeypatch.setattr(module, "SHARD_SIZE", 1)  # a file for each tensor
    part, write = part_of(source, "fp8"), writing.write_safetensors

    def stop(path, tensors):
        if tensors[0].key.endswith("weight_scale"):
            raise KeyboardInterrupt
        write(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_safetensors", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare([part])
    prepare([part_of(source, "fp8")])
    assert_equal(
        find_prepared(read_model(source), "fp8").load(BF16), quantize(read_model(source).load(BF16), "fp8")
    )


def test_a_prepared_model_is_not_written_again(source, cache, monkeypatch):
    prepared(source)
    monkeypatch.setattr(writing, "write_safetensors", None)
    prepare([part_of(source)])
    assert part_of(source).nbytes_left == 0


def test_two_processes_at_once(source, cache):
    parts = [part_of(source) for _ in range(4)]
    threads = [threading.Thread(target=prepare, args=([part],)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_equal(find_prepared(read_model(source), "bf16").load(BF16), read_model(source).load(BF16))
    assert len(list(cache.glob("transformer*"))) == 1


def test_who_waits_says_so(source, cache, caplog):
    part = part_of(source)
    with part.unfinished:
        waiting = threading.Thread(target=prepare, args=([part],))
        waiting.start()
        waiting.join(1.5)
        assert waiting.is_alive() and not part.done
    waiting.join()
    assert part.done
    assert re.fullmatch(rf"{part.folder} is being written by .*; waiting for it", caplog.messages[0])


def test_a_text_encoder_of_zeros_is_refused(tmp_path, cache):
    model = random_text_encoder(1)
    model.shared.weight.data.zero_()
    model.save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="is all zero"):
        prepared(tmp_path / "t5")
    assert not list(cache.glob("text*"))


def test_a_call_that_was_killed_at_its_very_end(source, cache, monkeypatch):
    part = part_of(source)
    with monkeypatch.context() as patch:
        patch.setattr(module.Unfinished, "_remove_journal", lambda self: None)
        prepare([part])
    assert part.done and len(list(cache.iterdir())) == 2
    prepare([part_of(source)])
    assert [path.name for path in cache.iterdir()] == [part.folder.name]


def test_room_is_asked_for_before_anything_is_written(source, cache, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs \S+ GB more, but its disk has 1e-06 GB left; .*WAN22_CACHE"):
        prepare([part_of(source)])
    assert not cache.exists()


def test_the_disk_fills_up(source, cache, monkeypatch):
    def full(path, tensors):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "write_safetensors", full)
    with pytest.raises(OSError, match=r"partial: the disk is full, \S+ GB are not written yet; make room"):
        prepare([part_of(source)])
    assert find_prepared(read_model(source), "bf16") is None


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda folder: (folder / RECORD).unlink(), "it has no prepared.json"),
        (lambda folder: (folder / RECORD).write_text("{"), "prepared.json is not JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (
            lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"12"),
            r"has 2 bytes, not \d+",
        ),
    ],
)
def test_a_damaged_one_is_not_used(damage, what, source, cache, caplog):
    folder = prepared(source).paths[0].parent
    damage(folder)
    assert find_prepared(read_model(source), "bf16") is None
    assert re.search(rf"is not used: .*{what}.*; delete the folder, and prepare again", caplog.text)
    with pytest.raises(FileExistsError, match="is damaged; delete it"):
        prepare([part_of(source)])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_memory_stays_small(form, tmp_path, cache, monkeypatch):
    """1.2 GB of float32, of which the largest tensor has 268 MB."""
    config = {"num_attention_heads": 32, "attention_head_dim": 128, "ffn_dim": 16384, "num_layers": 1}
    with torch.device("meta"):
        model = WanTransformer3DModel(**config, text_dim=64, freq_dim=32)
    noise = torch.randn(2**20)
    tensors = {
        n: noise.repeat(-(-p.numel() // 2**20))[: p.numel()].view(p.shape)
        for n, p in model.named_parameters()
    }
    size = sum(t.nbytes for t in tensors.values())
    assert size > 1e9
    (tmp_path / "big").mkdir()
    save_file(tensors, tmp_path / "big/diffusion_pytorch_model.safetensors")
    model.save_config(tmp_path / "big")
    del tensors
    seen = []
    monkeypatch.setattr(safetensors, "advance", lambda nbytes: seen.append(anonymous_memory()))
    before = anonymous_memory()
    found = prepared(tmp_path / "big", form)
    assert len(seen) > 30 and max(seen) - before < 250e6, (max(seen) - before) / 1e6
    before = anonymous_memory()
    loaded = found.load()
    assert anonymous_memory() - before < size / 100, "mapped"
    assert sum(p.nbytes for p in loaded.parameters()) > size / 4
