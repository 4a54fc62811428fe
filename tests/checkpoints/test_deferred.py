"""Deferred weights: the values of conversion at loading, without their memory."""

import copy
import pickle

import gguf
import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from tests.checkpoints import writers
from wan22 import WanTransformer3DModel
from wan22.accel.offload.layout import packed_blocks
from wan22.checkpoints import deferred as module
from wan22.checkpoints.deferred import DeferredWeight, deferred, deferred_weights, deferring, settle
from wan22.checkpoints.files.quantized import GgufBlocks, QuantizedTensor, scaled_tensor
from wan22.checkpoints.files.weights import read_weights
from wan22.checkpoints.loading import fill


def layer():
    """A linear layer in bfloat16 whose file has float32, and the same layer converted."""
    torch.manual_seed(0)
    plain, lazy = nn.Linear(64, 32), nn.Linear(64, 32, device="meta")
    for name, tensor in plain.named_parameters():
        lazy.register_parameter(name, nn.Parameter(deferred(tensor.detach().clone(), torch.bfloat16)))
    return lazy, plain.bfloat16()


@pytest.fixture
def file(tmp_path):
    """A file of a transformer in float32."""
    model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=24, ffn_dim=40, num_layers=2)
    model.save_pretrained(tmp_path)
    return tmp_path


X = torch.linspace(-1, 1, 3 * 64).view(3, 64).bfloat16()


def test_it_looks_and_computes_like_the_converted_weight():
    lazy, plain = layer()
    assert (lazy.weight.dtype, lazy.weight.shape, lazy.weight.device) == (torch.bfloat16, (32, 64), X.device)
    assert isinstance(lazy.weight, nn.Parameter) and lazy.weight.requires_grad
    assert torch.equal(lazy(X), plain(X))
    lazy(X).sum().backward()
    plain(X).sum().backward()
    assert torch.equal(lazy.weight.grad, plain.weight.grad)
    assert len(list(deferred_weights(lazy))) == 2  # still


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.float32),
        lambda m: m.half(),
        lambda m: m.to("meta"),
        lambda m: settle(m) or m,
        lambda m: m.load_state_dict({name: torch.zeros_like(t) for name, t in m.state_dict().items()}) and m,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: copy.deepcopy(m).to(torch.float64),
    ],
    ids=["float32", "half", "meta", "settle", "load_state_dict", "pickle", "a copy"],
)
def test_what_changes_it_does_what_it_does_to_the_converted_weight(change):
    lazy, plain = layer()
    lazy, plain = change(lazy), change(plain)
    for name, expected in plain.named_parameters():
        found = lazy.get_parameter(name)
        assert (found.dtype, found.device) == (expected.dtype, expected.device)
        assert found.is_meta or torch.equal(found, expected)


def test_writing_to_it_is_kept_and_leaves_copies_alone():
    lazy, plain = layer()
    twin = copy.deepcopy(lazy)
    with torch.no_grad():
        lazy.weight.data += 1
        lazy.weight.mul_(2)
        expected = (plain.weight + 1) * 2
    assert torch.equal(lazy.weight, expected)
    assert torch.equal(twin.weight, plain.weight)
    assert torch.equal(copy.deepcopy(lazy).weight, expected)


def test_the_file_is_not_written_to():
    """A weight in the file's own dtype, too: whoever writes to it gets a copy."""
    stored = torch.ones(4)
    weight = deferred(stored, torch.float32)
    weight.add_(1)
    assert torch.equal(stored, torch.ones(4)) and torch.equal(weight, torch.full((4,), 2.0))


def test_a_model_loads_so_where_memory_is_short(file, monkeypatch):
    monkeypatch.setattr(fill, "DEFERRED_SIZE", 1)
    plain = WanTransformer3DModel.from_pretrained(file, dtype=torch.bfloat16)
    assert not list(deferred_weights(plain))
    converted = sum(p.nbytes for p in plain.parameters() if p.dtype == torch.bfloat16)
    for free, deferred_here in ((2 * converted, False), (2 * converted - 2, True)):
        monkeypatch.setattr(module, "available_ram", lambda free=free: free)
        model = WanTransformer3DModel.from_pretrained(file, dtype=torch.bfloat16)
        assert bool(list(deferred_weights(model))) == deferred_here
        assert {n: (p.dtype, torch.equal(p, q)) for (n, p), q in named(model, plain)} == {
            n: (q.dtype, True) for n, q in plain.named_parameters()
        }


def named(model, other):
    return zip(model.named_parameters(), other.parameters(), strict=True)


def test_it_is_saved_as_an_ordinary_weight(file, tmp_path, monkeypatch):
    monkeypatch.setattr(fill, "DEFERRED_SIZE", 1)
    with deferring():
        model = WanTransformer3DModel.from_pretrained(file, dtype=torch.bfloat16)
    assert any(isinstance(p, DeferredWeight) for p in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    saved = WanTransformer3DModel.from_pretrained(tmp_path / "saved")
    expected = WanTransformer3DModel.from_pretrained(file, dtype=torch.bfloat16)
    assert all(torch.equal(p, q) and p.dtype == q.dtype for (_, p), q in named(saved, expected))


def test_accelerate_offloads_it(file, monkeypatch):
    """Weight by weight, as enable_sequential_cpu_offload does."""
    monkeypatch.setattr(fill, "DEFERRED_SIZE", 1)
    plain = WanTransformer3DModel.from_pretrained(file, dtype=torch.bfloat16)
    with deferring():
        model = WanTransformer3DModel.from_pretrained(file, dtype=torch.bfloat16)
    arguments = torch.randn(1, 16, 1, 4, 4), torch.tensor([3.0]), torch.randn(1, 512, 4096).bfloat16()
    with torch.no_grad():
        expected = plain(*arguments).sample
        cpu_offload(model, torch.device("cpu"))
        assert all(weight.is_meta for weight in model.parameters())
        assert torch.equal(model(*arguments).sample, expected)


def test_quantised_weights_are_expanded_when_they_are_used(file, tmp_path, monkeypatch):
    weights = {n: t.clone() for n, t in WanTransformer3DModel.from_pretrained(file).state_dict().items()}
    path = tmp_path / "a.safetensors"
    writers.comfy_old(weights, path)
    monkeypatch.setattr(fill, "DEFERRED_SIZE", 1)
    load = WanTransformer3DModel.from_single_file
    expected = load(path, dtype=torch.bfloat16, dequantize=True, attention_head_dim=24)
    with deferring():
        model = load(path, dtype=torch.bfloat16, dequantize=True, attention_head_dim=24)
    assert isinstance(model.blocks[0].ffn.net[2].weight, DeferredWeight)
    assert all(torch.equal(p, q) for (_, p), q in named(model, expected))
    assert read_weights(path).tensors  # the file is as it was


def stored_forms():
    """Matrices of 40 rows as files have them."""
    torch.manual_seed(0)
    values = torch.randn(40, 64)
    data = (values * 100).to(torch.float8_e4m3fn)
    blocks = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
    yield values
    yield scaled_tensor(data, torch.tensor(0.01))
    yield scaled_tensor(data, torch.rand(40))
    yield scaled_tensor(data, torch.rand(40, 4, 1))
    yield QuantizedTensor((40, 64), GgufBlocks("Q8_0", (40, 64)), {"data": torch.from_numpy(blocks)})


@pytest.mark.parametrize("stored", stored_forms(), ids=["plain", "one", "rows", "groups", "blocks"])
@pytest.mark.parametrize("indices", [[[3, 0, 39], [3, 3, 1]], [[]], [7]], ids=str)
def test_an_embedding_converts_the_rows_that_it_looks_up(stored, indices, monkeypatch):
    indices = torch.tensor(indices, dtype=torch.long)
    lazy = nn.Embedding(40, 64, device="meta")
    lazy.weight = nn.Parameter(deferred(stored, torch.bfloat16))
    expected = nn.functional.embedding(indices, lazy.weight.dequantize())
    monkeypatch.setattr(module._Values, "converted", None)
    assert torch.equal(lazy(indices), expected)
    assert packed_blocks(nn.Sequential(lazy), host=True)[0].nbytes == 0


def test_an_embedding_looks_up_what_was_written():
    """Through a view of its weight, too."""
    lazy = nn.Embedding(40, 64, device="meta")
    lazy.weight = nn.Parameter(deferred(torch.randn(40, 64), torch.bfloat16))
    with torch.no_grad():
        lazy.weight[3] = 1
    assert torch.equal(lazy(torch.tensor([3])), torch.ones(1, 64).bfloat16())
