"""LoKr, LoHa and DoRA compute what the merged weights compute, also beside LoRAs."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from tests.builders import latents_of, random_pipeline
from tests.checkpoints.lora_writers import DIALECTS, in_diffusers, linears, save
from tests.pipelines.attached.merged_loras import SLOTS, close, merged


def factors(o, n):
    """Split sizes as LyCORIS does: the first factor the smaller."""
    return [(4, o // 4), (4, n // 4)]


def lokr(o, n, form):
    """Return a LoKr's tensors and the weight that they stand for, before alpha."""
    (o1, o2), (n1, n2) = factors(o, n)
    parts = {"lokr_w1": torch.randn(o1, n1) * 0.2}
    if "a" in form:
        parts = {"lokr_w1_a": torch.randn(o1, 2) * 0.4, "lokr_w1_b": torch.randn(2, n1) * 0.4}
    if "b" in form:
        parts |= {"lokr_w2_a": torch.randn(o2, 2) * 0.4, "lokr_w2_b": torch.randn(2, n2) * 0.4}
    else:
        parts["lokr_w2"] = torch.randn(o2, n2) * 0.2
    first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    second = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    return parts, torch.kron(first, second), 2 if form else None


def loha(o, n, form):
    parts = {
        f"hada_w{i}_{side}": torch.randn(*shape) * 0.5
        for i in (1, 2)
        for side, shape in (("a", (o, 3)), ("b", (3, n)))
    }
    a, b, c, d = (parts[f"hada_w{i}_{side}"] for i in (1, 2) for side in "ab")
    return parts, (a @ b) * (c @ d), 3


@pytest.mark.parametrize(("make", "form"), [(lokr, ""), (lokr, "a"), (lokr, "b"), (lokr, "ab"), (loha, "")])
def test_lokr_and_loha(make, form, pipe, plain, tmp_path):
    torch.manual_seed(1)
    file, deltas = {}, {}
    for module, (o, n) in linears(pipe.transformer).items():
        parts, delta, rank = make(o, n, form)
        alpha = 1.5
        for name, tensor in (parts | {"alpha": torch.tensor(alpha)}).items():
            file[f"lycoris_{module.replace('.', '_')}.{name}"] = tensor
        # A LoKr of two whole factors has no rank, and its alpha does not count.
        deltas[f"{in_diffusers(module)}.weight"] = delta * (alpha / rank if rank else 1)
    save_file(file, tmp_path / "w.safetensors")
    pipe.load_lora_weights(tmp_path / "w.safetensors", strength=0.5)
    nothing = {slot: {} for slot in SLOTS}
    expected = merged((0.5, 0.5), nothing, deltas)
    assert (expected - plain).norm() > 0.02 * plain.norm()
    close(latents_of(pipe), expected)
    pipe.fuse_lora()
    close(latents_of(pipe), expected)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), plain)


@pytest.mark.parametrize("key", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora(key, pipe, tables, plain, tmp_path):
    """The weight's rows get the lengths that the file holds."""
    file = DIALECTS["diffusion_model, alpha"](tables["transformer"])
    expected = copy.deepcopy(random_pipeline())
    generator = torch.Generator().manual_seed(2)
    for module, (down, up, alpha) in tables["transformer"].items():
        lengths = torch.rand(up.shape[0], generator=generator) + 0.5
        file[f"diffusion_model.{module}.{key}"] = lengths[:, None] if key == "dora_scale" else lengths
        for slot in SLOTS:
            weight = getattr(expected, slot).get_submodule(in_diffusers(module)).weight.data
            moved = weight + alpha / down.shape[0] * (up @ down)
            weight.copy_(moved / moved.norm(dim=1, keepdim=True) * lengths[:, None])
    save_file(file, tmp_path / "w.safetensors")
    pipe.load_lora_weights(tmp_path / "w.safetensors")
    close(latents_of(pipe), latents_of(expected))
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), plain)


def test_adapters_of_several_kinds_together(pipe, tables, plain, tmp_path):
    """PEFT's layers then stand around one another."""
    torch.manual_seed(1)
    file, deltas = {}, {}
    for module, (o, n) in linears(pipe.transformer).items():
        parts, delta, _ = lokr(o, n, "")
        file |= {f"lycoris_{module.replace('.', '_')}.{name}": tensor for name, tensor in parts.items()}
        deltas[f"{in_diffusers(module)}.weight"] = delta
    save_file(file, tmp_path / "lokr.safetensors")
    both = dict.fromkeys(SLOTS, tables["transformer"])
    path = save(tables["transformer"], tmp_path / "w.safetensors")
    for name, source in (("a", path), ("b", tmp_path / "lokr.safetensors"), ("c", path)):
        pipe.load_lora_weights(source, name)
    pipe.set_adapters(["a", "b"])
    expected = merged((1, 1), both, deltas)
    close(latents_of(pipe), expected)
    pipe.set_adapters("c")
    close(latents_of(pipe), merged((1, 1), both))
    pipe.set_adapters(["b", "c"])
    before = latents_of(pipe)
    pipe.fuse_lora()
    close(latents_of(pipe), expected)
    pipe.unfuse_lora()
    assert torch.equal(latents_of(pipe), before)
    pipe.delete_adapters("b")
    close(latents_of(pipe), merged((1, 1), both))
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), plain)
    assert type(pipe.transformer.blocks[0].attn1.to_q) is torch.nn.Linear
