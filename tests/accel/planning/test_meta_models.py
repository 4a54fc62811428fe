"""Meta copies of models: the same structure and bytes, no weights, and nothing of what hangs on the model."""

import copy

import accelerate
import pytest
import torch

from tests.accel.offload.offloaders import inputs_of, velocity
from tests.builders import random_components, random_pipeline, random_text_encoder, random_transformer
from tests.checkpoints.lora_writers import make_lora, save
from wan22 import WanTransformer3DModel, presets
from wan22.accel.compile import Compiled
from wan22.accel.offload.layout import blocks_of, bytes_of
from wan22.accel.planning.meta_models import meta_copies, meta_copy, released_models, store_as
from wan22.accel.planning.trace import FusedAttention
from wan22.accel.quantization.layers import is_quantized
from wan22.accel.quantize import quantize
from wan22.checkpoints.lora.adapters import lora_layers


def tensors(model):
    return {name: (t.shape, t.dtype) for name, t in (*model.named_parameters(), *model.named_buffers())}


def own_transformer(layers=2):
    model = copy.deepcopy(random_transformer(0))
    model.blocks.extend(copy.deepcopy(model.blocks[0]) for _ in range(layers - len(model.blocks)))
    return model


def runs_on_meta(model):
    """Whether a copy computes without any weight."""
    inputs = {name: value.to("meta") for name, value in inputs_of(model).items()}
    with torch.no_grad(), FusedAttention():
        return model(**inputs).sample.is_meta


def test_copies_have_no_weights_and_the_same_bytes():
    components = random_components()
    for name, model in meta_copies(components).items():
        assert tensors(model) == tensors(components[name])
        assert bytes_of(model) == bytes_of(components[name])
        assert all(p.is_meta and not p.requires_grad for p in model.parameters())
        assert not any(p.is_meta for p in components[name].parameters())


def test_tied_weights_stay_tied():
    encoder = meta_copy(random_text_encoder(1))
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_blocks(count):
    model = own_transformer(4)
    short = meta_copy(model, blocks=count)
    assert len(blocks_of(short)) == count and len(blocks_of(model)) == 4
    assert runs_on_meta(short)
    assert len(blocks_of(meta_copy(random_text_encoder(1), blocks=1))) == 1


def test_dtypes():
    model = own_transformer()
    dtypes = dict.fromkeys(dict(model.named_parameters()), torch.float16)
    assert {p.dtype for p in meta_copy(model, dtypes=dtypes).parameters()} == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_quantised_layers():
    model = own_transformer()
    quantize(model, "int8")
    twin = meta_copy(model)
    assert is_quantized(twin) and bytes_of(twin) == bytes_of(model)
    assert runs_on_meta(twin)


def test_loras(tmp_path):
    pipe = random_pipeline(experts=1, transformer=own_transformer())
    pipe.load_lora_weights(save(make_lora(pipe.transformer, 1), tmp_path / "a.safetensors"))
    twin = meta_copy(pipe.transformer)
    assert len(lora_layers(twin)) == len(lora_layers(pipe.transformer)) > 0
    assert tensors(twin) == tensors(pipe.transformer)
    assert runs_on_meta(twin)


def test_hooks_and_patched_methods_are_left_behind():
    model = own_transformer()
    expected, called = velocity(model), []
    Compiled([model], backend="eager")
    model.blocks[0].register_forward_hook(lambda *_: called.append("hook"))
    accelerate.cpu_offload_with_hook(model, torch.device("cpu"))
    for found in (meta_copy(model), meta_copy(torch.compile(model))):
        assert type(found) is WanTransformer3DModel
        assert "_hf_hook" not in vars(found) and "forward" not in vars(found.blocks[0])
        assert runs_on_meta(found)
    assert called == []
    torch.testing.assert_close(velocity(model), expected)
    assert called == ["hook"]


def test_hooks_and_patched_methods_can_be_copied():
    """They are the copy's own: what is attached to it later is not attached to the model."""
    model, called = own_transformer(), []
    Compiled([model], backend="eager")
    model.blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: called.append(block), with_kwargs=True
    )
    twin = meta_copy(model, attached=True)
    block = twin.blocks[0]
    assert block.forward.__self__ is block
    assert block.forward.__func__ is model.blocks[0].forward.__func__
    twin.blocks[1].register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    assert not model.blocks[1]._forward_pre_hooks and not model.blocks[1]._forward_pre_hooks_with_kwargs
    twin.to_empty(device="cpu").load_state_dict(model.state_dict())
    torch.testing.assert_close(velocity(twin), velocity(model))
    assert called == [block, model.blocks[0]]


def test_dtypes_of_released_checkpoints():
    """Loaded in bfloat16, what is stored in float32 keeps float32 arithmetic in float32."""
    models = released_models(presets.TI2V_5B)
    assert {p.dtype for p in models["transformer"].parameters()} == {torch.bfloat16, torch.float32}
    assert {p.dtype for p in models["vae"].parameters()} == {torch.float32}
    full = released_models(presets.TI2V_5B, {"transformer": torch.float32})["transformer"]
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    store_as(full, torch.bfloat16, stored=torch.float32)
    assert 0 < bytes_of(full) - bytes_of(models["transformer"]) < 0.02 * bytes_of(full)
