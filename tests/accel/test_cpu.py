"""oneDNN's products give the same results up to rounding, and leave no trace."""

import copy

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from torch import nn

from tests.builders import latents_of, random_components, random_i2v_pipeline, random_pipeline
from tests.builders import random_ti2v_pipeline as ti2v
from tests.golden_data import relative_error
from tests.models.vaes import FAMILIES, random_latents, random_video, tiny_vae
from wan22.accel import cpu
from wan22.accel.compile import Compiled
from wan22.accel.quantize import quantize
from wan22.models.rope import rotary_tables
from wan22.models.transformer import WanTransformerBlock

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    """In the tests' models all layers are."""
    monkeypatch.setattr(cpu, "_LARGE", 0)


@pytest.fixture
def block():
    torch.manual_seed(0)
    return WanTransformerBlock(96, 256, 4, True, 1e-6).eval()


def inputs(dtype):
    torch.manual_seed(1)
    rotary = rotary_tables((2, 4, 4), 24, torch.device("cpu"))
    return torch.randn(1, 32, 96), torch.randn(1, 6, 96).to(dtype), torch.randn(1, 1, 6, 96), rotary


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
def test_a_block(block, dtype, bound, monkeypatch):
    block.to(dtype)
    with torch.no_grad():
        plain = block(*inputs(dtype))
        cpu.accelerate(block)
        assert relative_error(block(*inputs(dtype)), plain) <= bound
        monkeypatch.setattr(cpu, "_fits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # or none of it was run
            block(*inputs(dtype))
        cpu.detach(block)
        assert torch.equal(block(*inputs(dtype)), plain)
    assert not any("forward" in vars(module) for module in block.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vae(family, monkeypatch):
    vae = tiny_vae(family)
    x = random_video(vae, 1, 3, 4, 6)
    with torch.no_grad():
        plain = vae.encode(x).latent_dist.mode(), vae.decode(random_latents(vae, 1, 3, 4, 6)).sample
        cpu.accelerate(vae)
        fast = vae.encode(x).latent_dist.mode(), vae.decode(random_latents(vae, 1, 3, 4, 6)).sample
        assert all(relative_error(*pair) <= 3e-6 for pair in zip(fast, plain, strict=True))
        monkeypatch.setattr(cpu, "_fits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            vae.encode(x)
        cpu.detach(vae)
        assert torch.equal(vae.encode(x).latent_dist.mode(), plain[0])
    assert not any("_conv_forward" in vars(module) for module in vae.modules())


def test_gradients_are_computed_as_before(block):
    given = inputs(torch.float32)
    block(*given).sum().backward()
    expected = {name: p.grad.clone() for name, p in block.named_parameters()}
    block.zero_grad()
    cpu.accelerate(block)
    block(*given).sum().backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in block.named_parameters())


def test_quantised_layers_stay_as_they_are():
    model = copy.deepcopy(random_components()["transformer"])
    quantize(model, "int8")
    x = {"hidden_states": torch.randn(1, 16, 2, 4, 4), "timestep": torch.tensor([500.0])}
    x["encoder_hidden_states"] = torch.randn(1, 5, model.config.text_dim)
    with torch.no_grad():
        plain = model(**x).sample
        cpu.accelerate(model)
        assert relative_error(model(**x).sample, plain) <= 1e-6


def test_compiled_as_well(block):
    torch._dynamo.reset()
    with torch.no_grad():
        plain = block(*inputs(torch.float32))
        cpu.accelerate(block)
        compiled = Compiled([block], backend="eager")
        assert relative_error(block(*inputs(torch.float32)), plain) <= 1e-6
        compiled.detach()
        cpu.detach(block)
        assert torch.equal(block(*inputs(torch.float32)), plain)


@pytest.mark.parametrize("form", [random_pipeline, random_i2v_pipeline, ti2v], ids=["t2v", "i2v", "ti2v"])
def test_pipelines(form, tmp_path):
    names = ("transformer", "transformer_2", "vae")
    pipe = form(**{n: copy.deepcopy(getattr(form(), n)) for n in names if getattr(form(), n) is not None})
    image = {} if form is random_pipeline else {"image": torch.rand(3, 32, 32)}
    arguments = {
        "prompt": "a",
        "seed": 1,
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "num_inference_steps": 3,
    }
    plain = pipe(**arguments, **image, output_type="pt").frames
    pipe.accelerate()
    assert relative_error(pipe(**arguments, **image, output_type="pt").frames, plain) <= 1e-5
    pipe.decelerate()
    assert torch.equal(pipe(**arguments, **image, output_type="pt").frames, plain)


def test_with_a_lora_that_comes_later(tmp_path):
    from tests.checkpoints.lora_writers import make_lora, save

    parts = {n: copy.deepcopy(random_components()[n]) for n in ("transformer", "transformer_2", "vae")}
    pipe = random_pipeline(**parts)
    plain = latents_of(pipe)
    path = save(make_lora(pipe.transformer, 1), tmp_path / "a.safetensors")
    pipe.load_lora_weights(path)
    expected = latents_of(pipe)
    pipe.unload_lora_weights()
    pipe.accelerate()
    pipe.load_lora_weights(path)
    assert relative_error(latents_of(pipe), expected) <= 2e-6
    pipe.unload_lora_weights()
    pipe.decelerate()
    assert torch.equal(latents_of(pipe), plain)


def in_groups(model):
    device = torch.device("cpu")
    apply_group_offloading(model, device, offload_type="leaf_level", offload_device=device)


HOOKS = {
    "groups": in_groups,
    "casts": lambda model: apply_layerwise_casting(
        model, torch.bfloat16, torch.float32, skip_modules_pattern=()
    ),
    "pieces": lambda model: accelerate.cpu_offload(model, "cpu"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_others_stay(block, name):
    given = inputs(torch.float32)
    with torch.no_grad():
        HOOKS[name](block)
        plain = block(*given)
        before = {module: module.forward for module in block.modules() if "forward" in vars(module)}
        assert before
        cpu.accelerate(block)
        assert all(module.forward is forward for module, forward in before.items())
        assert relative_error(block(*given), plain) <= 1e-6
        cpu.detach(block)
        assert torch.equal(block(*given), plain)
        assert not any("_onednn" in vars(module) for module in block.modules())


@pytest.mark.parametrize("name", ["groups", "pieces"])
def test_detached_inside_of_hooks_that_came_later(block, name, monkeypatch):
    given = inputs(torch.float32)
    calls = []
    products = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: calls.append(1) or products(*a))
    with torch.no_grad():
        plain = block(*given)
        cpu.accelerate(block)
        HOOKS[name](block)
        for _ in range(2):  # the second call keeps what is inside
            calls.clear()
            assert relative_error(block(*given), plain) <= 1e-6
            assert calls
            cpu.accelerate(block)
        cpu.detach(block)
        calls.clear()
        assert torch.equal(block(*given), plain)
        assert not calls


def test_elsewhere_nothing_is_changed(block):
    block.to("meta")
    cpu.accelerate(block)
    assert not any("forward" in vars(module) for module in block.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["load", "assign", "write", "cast"])
def test_a_weight_that_has_changed_since_counts(change, dtype):
    def changed(conv):
        state = {key: value * 2 for key, value in conv.state_dict().items()}
        if change == "write":
            with torch.no_grad():
                conv.weight.mul_(2)
                conv.bias.mul_(2)
        elif change == "cast":
            conv.double().to(dtype)
        else:
            conv.load_state_dict(state, assign=change == "assign")
        return conv

    torch.manual_seed(0)
    x, plain = torch.randn(1, 4, 3, 5, 6, dtype=dtype), nn.Conv3d(4, 8, 3, dtype=dtype)
    conv = copy.deepcopy(plain)
    with torch.no_grad():
        cpu.accelerate(conv)
        assert vars(conv)["_onednn"].serves(conv.weight)
        changed(conv)
        assert not vars(conv)["_onednn"].serves(conv.weight)
        bound = 1e-6 if dtype == torch.float32 else 5e-3
        assert relative_error(conv(x), changed(plain)(x)) <= bound
        cpu.accelerate(conv)
        assert vars(conv)["_onednn"].serves(conv.weight)
        assert relative_error(conv(x), plain(x)) <= bound


def test_a_copy_has_weights_of_its_own():
    conv, x = nn.Conv3d(4, 8, 3), torch.randn(1, 4, 3, 5, 6)
    with torch.no_grad():
        expected = conv(x)
        cpu.accelerate(conv)
        other = copy.deepcopy(conv)
        conv.weight.zero_()
        assert relative_error(other(x), expected) <= 1e-6
        cpu.detach(other)
        assert torch.equal(other(x), expected)
