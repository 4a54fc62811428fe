"""LoRAs in models that are compiled, offloaded or quantised."""

import copy

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch._dynamo.testing import CompileCounter

from tests.builders import latents_of, random_pipeline
from tests.checkpoints import writers
from tests.checkpoints.lora_writers import save
from tests.pipelines.attached.merged_loras import SLOTS, close, merge
from wan22 import WanTransformer3DModel
from wan22.checkpoints.naming.keys import TRANSFORMER
from wan22.checkpoints.quantized_linear import QuantizedLinear


def test_a_strength_does_not_recompile(pipe, tables, tmp_path):
    pipe.load_lora_weights(save(tables["transformer"], tmp_path / "w.safetensors"))
    model = pipe.transformer
    ids = {name: id(p) for name, p in model.named_parameters()}
    pipe.set_adapters("default_0", 0.5)
    assert {name: id(p) for name, p in model.named_parameters()} == ids
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    config = model.config
    x = torch.randn(1, config.in_channels, 2, 4, 4)
    arguments = (x, torch.tensor([500.0]), torch.randn(1, 3, config.text_dim))
    with torch.no_grad():
        results = []
        for strength in (0.5, 0.8, 0.2):
            pipe.set_adapters("default_0", strength)
            results.append(compiled(*arguments, return_dict=False)[0])
            torch.testing.assert_close(results[-1], model(*arguments, return_dict=False)[0])
    assert not torch.equal(results[0], results[1])
    assert counter.frame_count <= 2, "one more, when the number becomes a variable"

    pipe.transformer = compiled  # as users do; adapters are then found inside of it
    pipe.set_adapters("default_0", 0.8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments, return_dict=False)[0], results[1])
    assert pipe.get_active_adapters() == ["default_0"]
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "w.safetensors")
    assert pipe.get_list_adapters() == {slot: ["default_0"] for slot in SLOTS}


def test_weights_that_are_offloaded(pipe, tables, both, plain, tmp_path):
    high, low = (save(tables[slot], tmp_path / f"{slot}.safetensors") for slot in SLOTS)
    cpu = torch.device("cpu")
    for slot in SLOTS:
        apply_group_offloading(
            getattr(pipe, slot), onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
        )
    pipe.load_lora_weights(high=high, low=low)
    matrix = pipe.transformer.blocks[0].attn1.to_q.lora_A["default_0"]
    assert matrix._diffusers_hook.get_hook("group_offloading") is not None
    close(latents_of(pipe), both)
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), plain)

    one_by_one = copy.deepcopy(random_pipeline())
    accelerate.cpu_offload(one_by_one.transformer, execution_device=cpu)
    with pytest.raises(ValueError, match="load LoRAs before enable_sequential_cpu_offload"):
        one_by_one.load_lora_weights(high=high)
    assert not hasattr(one_by_one.transformer.blocks[0].attn1.to_q, "lora_A")


def test_on_scaled_float8(tmp_path, tables):
    config = dict(random_pipeline().transformer.config)
    sizes = {k: v for k, v in config.items() if not k.startswith("_")}
    official = {
        TRANSFORMER.inverse.rename(name): w for name, w in random_pipeline().transformer.state_dict().items()
    }
    values = writers.grouped(official, tmp_path / "base.safetensors")
    base = WanTransformer3DModel.from_single_file(
        tmp_path / "base.safetensors", dtype=torch.float32, attention_head_dim=config["attention_head_dim"]
    )
    plain = WanTransformer3DModel(**sizes).eval()
    plain.load_state_dict({TRANSFORMER.rename(name): w for name, w in values.items()})
    pipe, expected = (random_pipeline() for _ in range(2))
    pipe, expected = copy.deepcopy(pipe), copy.deepcopy(expected)
    pipe.transformer, expected.transformer = base, plain
    high = save(tables["transformer"], tmp_path / "w.safetensors")
    quantised = latents_of(pipe)
    pipe.load_lora_weights(high=high)
    merge(expected.transformer, tables["transformer"])
    torch.testing.assert_close(latents_of(pipe), latents_of(expected), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="layers are quantised, and fusing needs their weights expanded"):
        pipe.fuse_lora()
    pipe.fuse_lora(dequantize=True)
    torch.testing.assert_close(latents_of(pipe), latents_of(expected), rtol=1e-4, atol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert isinstance(pipe.transformer.blocks[0].attn1.to_q, QuantizedLinear)
    assert torch.equal(latents_of(pipe), quantised)


def test_a_whole_difference_of_a_quantised_weight_is_refused(pipe):
    """It would go into the copy that is expanded at each call, and be lost."""
    before = pipe.transformer.blocks[0].attn1.to_q.weight
    pipe.quantize("int8")
    delta = {"diffusion_model.blocks.0.self_attn.q.diff": torch.ones_like(before)}
    with pytest.raises(
        ValueError, match=r"differences of blocks\.0\.attn1\.to_q\.weight, which are quantised"
    ):
        pipe.load_lora_weights(delta)
    assert pipe.get_list_adapters() == {}
    pipe.load_lora_weights({"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(len(before))})


def test_on_torchao(pipe, tables, tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    pipe.load_lora_weights(save(tables["transformer"], tmp_path / "w.safetensors"))
    expected = latents_of(pipe)
    pipe.unload_lora_weights()
    for slot in SLOTS:
        torchao.quantize_(getattr(pipe, slot).blocks, torchao.Int8WeightOnlyConfig())
    quantised = latents_of(pipe)
    pipe.load_lora_weights(tmp_path / "w.safetensors")
    assert (latents_of(pipe) - expected).norm() < 0.3 * (quantised - expected).norm()
    with pytest.raises(ValueError, match=r"layers are quantised .*leave the LoRA unfused"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), quantised)
