"""The trained file: it loads into wan22, diffusers and PEFT at the strength that was trained."""

import json

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from tests.training.conftest import settings
from wan22 import WanT2VPipeline, tiny_checkpoint
from wan22.training.adapters import ADAPTER, attach
from wan22.training.export import write_lora
from wan22.training.loop import Training

pytestmark = pytest.mark.usefixtures("encoded")

SLOTS = {"transformer": "high", "transformer_2": "low"}


def trained(tmp_path, **changes):
    """Train for some steps; return the trainings' models and their files."""
    training = Training(settings(tmp_path, alpha=3.0, **changes))
    result = training.run()
    return training, result.files


def inputs():
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 8, 8, generator=random)
    return latents, torch.tensor([950.0]), torch.randn(1, 512, 64, generator=random)


@torch.no_grad()
def velocity(model):
    return model(*inputs(), return_dict=False)[0]


@pytest.mark.parametrize("diffusers_names", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_pipeline_computes_what_was_trained(method, diffusers_names, tmp_path):
    training, files = trained(tmp_path, method=method, diffusers_names=diffusers_names)
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    plain = velocity(pipe.transformer)
    pipe.load_lora_weights(**{SLOTS[slot]: path for slot, path in files.items()})
    for trainee in training.trainees:
        expected = velocity(trainee.model.eval())
        found = velocity(getattr(pipe, trainee.slot))
        # The file is bfloat16.
        change = (expected - plain).norm() if trainee.slot == "transformer" else expected.norm()
        assert (found - expected).norm() < 1e-2 * change


@pytest.mark.parametrize("diffusers_names", [False, True])
def test_diffusers_computes_what_wan22_does(diffusers_names, tmp_path):
    _, files = trained(tmp_path, diffusers_names=diffusers_names)
    ours = WanT2VPipeline.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    ours.load_lora_weights(**{SLOTS[slot]: path for slot, path in files.items()})
    theirs = WanPipeline.from_pretrained(tiny_checkpoint(), torch_dtype=torch.float32)
    for slot, path in files.items():
        into_second = {"load_into_transformer_2": True} if slot == "transformer_2" else {}
        theirs.load_lora_weights(path, adapter_name=SLOTS[slot], **into_second)
    for slot in SLOTS:
        found, expected = velocity(getattr(theirs, slot)), velocity(getattr(ours, slot))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_peft_computes_what_wan22_does(tmp_path):
    """Its own loader takes PEFT's names, and the configuration in the header."""
    from peft import LoraConfig, set_peft_model_state_dict
    from peft.tuners.lora import LoraModel

    _, files = trained(tmp_path, diffusers_names=True, expert="high")
    path = files["transformer"]
    with safe_open(path, "pt") as file:
        entries = json.loads(file.metadata()["lora_adapter_metadata"])
    entries = {name.removeprefix("transformer."): value for name, value in entries.items()}
    assert entries["lora_alpha"] == 3.0 and entries["r"] == 2
    known = {name: entries[name] for name in ("r", "lora_alpha", "target_modules")}
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    model = LoraModel(pipe.transformer, LoraConfig(**known), ADAPTER)
    state = {name.removeprefix("transformer."): t.float() for name, t in load_file(path).items()}
    result = set_peft_model_state_dict(model, {f"model.{name}": t for name, t in state.items()}, ADAPTER)
    assert not result.unexpected_keys
    ours = WanT2VPipeline.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    ours.load_lora_weights(high=path)
    torch.testing.assert_close(velocity(model.model), velocity(ours.transformer), rtol=0, atol=2e-5)


def test_names_are_comfyui_s_generic_ones(tmp_path):
    _, files = trained(tmp_path)
    tensors = load_file(files["transformer"])
    stem = "diffusion_model.blocks.0.self_attn.q"
    assert {n for n in tensors if n.startswith(f"{stem}.")} == {
        f"{stem}.{part}" for part in ("lora_A.weight", "lora_B.weight", "alpha")
    }
    assert tensors[f"{stem}.alpha"].item() == 2 == len(tensors[f"{stem}.lora_A.weight"])
    assert tensors[f"{stem}.lora_B.weight"].dtype == torch.bfloat16
    layers = {name.rsplit(".", 2)[0] if "lora" in name else name.removesuffix(".alpha") for name in tensors}
    # Ten linear layers of each block, and nothing else.
    assert len(layers) == 10 * 6 and all(".blocks." in name for name in layers)


def test_alpha_over_rank_is_in_the_matrices(tmp_path):
    """A reader that ignores alphas computes with the same strength."""
    pipe = WanT2VPipeline.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    parameters = attach(pipe.transformer, settings(tmp_path, alpha=6.0))
    name = "blocks.0.attn1.to_q"
    random = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=random)
    a, b = (parameters[f"{name}.{part}.weight"].data for part in ("lora_A", "lora_B"))
    write_lora(tmp_path / "x.safetensors", pipe.transformer, {"format": "pt"})
    file = load_file(tmp_path / "x.safetensors")
    stem = "diffusion_model.blocks.0.self_attn.q"
    found = file[f"{stem}.lora_B.weight"].float() @ file[f"{stem}.lora_A.weight"].float()
    torch.testing.assert_close(found, 3 * b @ a, rtol=0.02, atol=0.05)
