"""Files that PEFT and diffusers write: what is read adds to the weights what they compute with."""

import diffusers
import peft
import pytest
import torch

from tests.builders import random_pipeline
from wan22.checkpoints.files.weights import read_weights
from wan22.checkpoints.lora.dialects import read_lora
from wan22.checkpoints.lora.sources import LoraSource, read_source

# PEFT takes vectors among its tensors, such as biases, for shards.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter.*invalid shape")

TARGETS = ["attn1.to_q", "attn2.to_out.0", "ffn.net.2"]
PATTERNS = {
    "rank_pattern": {"attn1.to_q": 2, "^blocks.1.ffn.net.2": 3},
    "alpha_pattern": {r"blocks\.0\..*": 7, "to_q": 5},  # in the order in which both write them
}
LORAS = {
    "plain": {"r": 4, "lora_alpha": 10},
    "rank-stabilised": {"r": 4, "lora_alpha": 10, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 3, **PATTERNS},
    "rank-stabilised patterns": {"r": 4, "lora_alpha": 3, "use_rslora": True, **PATTERNS},
    "biases": {"r": 4, "lora_alpha": 10, "lora_bias": True},
    "DoRA": {"r": 4, "lora_alpha": 10, "use_dora": True, "use_rslora": True},
}
CONFIGS = {
    **{
        name: lambda targets, o=options: peft.LoraConfig(target_modules=targets, **o)
        for name, options in LORAS.items()
    },
    "LoHa": lambda targets: peft.LoHaConfig(r=3, alpha=5, target_modules=targets),
    "LoKr": lambda targets: peft.LoKrConfig(r=3, alpha=5, target_modules=targets, decompose_both=True),
    "LoKr, whole": lambda targets: peft.LoKrConfig(r=64, alpha=5, target_modules=targets),
}


@pytest.fixture
def model():
    ours = random_pipeline().transformer
    theirs = diffusers.WanTransformer3DModel.from_config(ours.config)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def randomise(model):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "lokr_")):
            torch.nn.init.normal_(parameter)


def changes(model, adapter):
    """What PEFT adds to each weight and bias."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            path = path.removeprefix("base_model.model.")
            found[f"{path}.weight"] = layer.get_delta_weight(adapter).detach()
            if hasattr(layer, "lora_B") and (bias := layer.lora_B[adapter].bias) is not None:
                found[f"{path}.bias"] = bias.detach() * layer.scaling[adapter]
    return found


def read_changes(lora):
    """What is read, by the definitions of the kinds."""
    found = dict(lora.deltas)
    for name, weights in lora.layers.items():
        p = weights.parts
        if weights.kind in ("lora", "dora"):
            product = p["lora_B"] @ p["lora_A"]
        elif weights.kind == "loha":
            product = (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
        else:
            product = torch.kron(
                *(p[w] if w in p else p[f"{w}_a"] @ p[f"{w}_b"] for w in ("lokr_w1", "lokr_w2"))
            )
        found[f"{name}.weight"] = weights.scale_alpha / weights.rank * product
    return found


def agree(file, model, adapter):
    shapes = {name: tuple(p.shape) for name, p in random_pipeline().transformer.named_parameters()}
    lora = read_lora(file, shapes)["transformer"]
    assert not lora.unmatched
    found, expected = read_changes(lora), changes(model, adapter)
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change)


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_saves(name, model, tmp_path):
    wrapped = peft.get_peft_model(model, CONFIGS[name](TARGETS), adapter_name="default")
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path)
    agree(read_source(tmp_path, LoraSource(None, "", {})), wrapped, "default")


@pytest.mark.parametrize("whole", ["a pipeline", "a model"])
@pytest.mark.parametrize("name", [*LORAS])
def test_diffusers_saves(name, whole, model, tmp_path):
    model.add_adapter(CONFIGS[name](TARGETS), "mine")
    randomise(model)
    if whole == "a model":
        model.save_lora_adapter(tmp_path, "mine")
    else:
        diffusers.WanPipeline.save_lora_weights(
            tmp_path,
            peft.get_peft_model_state_dict(model, adapter_name="mine"),
            transformer_lora_adapter_metadata=model.peft_config["mine"].to_dict(),
        )
    agree(read_weights(tmp_path / "pytorch_lora_weights.safetensors"), model, "mine")
