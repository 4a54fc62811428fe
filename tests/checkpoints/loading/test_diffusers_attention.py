"""Attention processors, fused projections and gradient checkpointing, as models of diffusers have them."""

import copy

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor as TheirProcessor

from tests.golden_data import relative_error
from tests.models.test_transformer import SMALL, WITH_IMAGE, random_inputs, random_model
from wan22.accel import attention as kernels
from wan22.checkpoints.loading import attention_names
from wan22.checkpoints.loading.diffusers_attention import WanAttnProcessor
from wan22.models import attention as registry
from wan22.models.transformer import WanAttention

CONFIGS = {"t2v": SMALL, "2.1-i2v": WITH_IMAGE, "2.1-flf": WITH_IMAGE | {"pos_embed_seq_len": 18}}


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs).sample


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_processor_of_diffusers_computes_the_same(config):
    model, inputs = random_model(config), random_inputs(config)
    plain = output(model, inputs)
    model.set_attn_processor(TheirProcessor())
    assert relative_error(output(model, inputs), plain) < 1e-5
    model.set_attn_processor({name: WanAttnProcessor() for name in model.attn_processors})
    assert torch.equal(output(model, inputs), plain)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_processor_that_calls_the_one_before(config):
    """The usual way to scale, mask or watch attention."""

    class Scaled:
        def __init__(self, before, factor):
            self.before, self.factor = before, factor

        def __call__(self, attn, *args, **kwargs):
            return self.factor * self.before(attn, *args, **kwargs)

    model, inputs = random_model(config), random_inputs(config)
    plain = output(model, inputs)
    before = model.attn_processors
    model.set_attn_processor({name: Scaled(processor, 1.0) for name, processor in before.items()})
    assert relative_error(output(model, inputs), plain) < 1e-6
    model.blocks[0].attn2.set_processor(Scaled(before["blocks.0.attn2.processor"], 0.0))
    assert relative_error(output(model, inputs), plain) > 1e-3


def test_a_callers_processor_in_half_precision():
    """Norms give it queries in its input's dtype, as those of diffusers do."""
    dtypes = []

    def processor(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.norm_q(attn.to_q(hidden_states)),
            attn.norm_k(attn.to_k(context)),
            attn.to_v(context),
        )
        dtypes.extend((query.dtype, key.dtype, value.dtype))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        out = dispatch_attention_fn(query, key, value).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out))

    model, inputs = random_model(SMALL).to(torch.bfloat16), random_inputs(SMALL)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].bfloat16()
    plain = output(model, inputs)
    model.set_attn_processor(processor)
    output(model, inputs)
    assert set(dtypes) == {torch.bfloat16}
    model.blocks[0].attn1.set_processor(None)
    assert isinstance(model.blocks[0].attn1.get_processor(), WanAttnProcessor)
    model.set_attn_processor(WanAttnProcessor())
    assert torch.equal(output(model, inputs), plain)


def test_what_is_no_processor_is_refused():
    model, inputs = random_model(SMALL), random_inputs(SMALL)
    with pytest.raises(ValueError, match="str is no attention processor; it must be callable"):
        model.set_attn_processor("flash")
    mask = torch.ones(1, 1)
    with pytest.raises(ValueError, match="Wan attends to all tokens"):
        WanAttnProcessor()(model.blocks[0].attn1, inputs["hidden_states"], attention_mask=mask)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_fused_projections(config):
    model, inputs = random_model(config), random_inputs(config)
    plain, names = output(model, inputs), set(model.state_dict())
    calls = []
    model.blocks[0].attn1.to_q.register_forward_hook(lambda *_: calls.append(1))
    model.fuse_qkv_projections()
    model.fuse_qkv_projections()
    assert relative_error(output(model, inputs), plain) < 1e-5
    assert not calls
    assert set(model.state_dict()) == names
    assert relative_error(output(copy.deepcopy(model), inputs), plain) < 1e-5
    model.unfuse_qkv_projections()
    assert torch.equal(output(model, inputs), plain)
    assert calls == [1]


def test_layers_that_cannot_be_fused_are_refused():
    peft = pytest.importorskip("peft")
    model = random_model(SMALL)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"]))
    with pytest.raises(ValueError, match="fuse before LoRAs and quantisation"):
        model.fuse_qkv_projections()


def test_gradient_checkpointing():
    model, inputs = random_model(SMALL), random_inputs(SMALL)
    calls = []
    model.blocks[0].attn1.register_forward_hook(lambda *_: calls.append(1))

    def gradients():
        model.zero_grad()
        model(**inputs).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    assert len(calls) == 1
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    for name, gradient in gradients().items():
        assert torch.allclose(gradient, plain[name], rtol=1e-5, atol=1e-8), name
    assert len(calls) == 3  # once more on the way back
    output(model, inputs)
    assert len(calls) == 4
    model.disable_gradient_checkpointing()
    gradients()
    assert len(calls) == 5


@pytest.mark.parametrize("two_frames", [False, True])
def test_image_tokens_without_projections_of_their_own(two_frames):
    """diffusers' own test of Wan 2.1 I2V is configured so: image tokens stand before the text."""
    config = WITH_IMAGE | {"added_kv_proj_dim": None, "pos_embed_seq_len": 18 if two_frames else None}
    model, inputs = random_model(config), random_inputs(config)
    theirs = diffusers.WanTransformer3DModel(**config).eval()
    theirs.load_state_dict(model.state_dict())
    assert relative_error(output(model, inputs), output(theirs, inputs)) <= 2e-6
    without = {name: value for name, value in inputs.items() if name != "encoder_hidden_states_image"}
    assert relative_error(output(model, without), output(model, inputs)) > 1e-3


# ---- kernels ----


@pytest.fixture
def counted():
    """Counts the calls of the kernel "math"."""
    calls = []
    kernels.select("math", "cpu", torch.float32)
    kernel = registry._kernels["math"]

    def count(*args):
        calls.append(1)
        return kernel.function(*args)

    registry.register("math", registry.Kernel(count))
    yield calls
    registry.register("math", kernel)


def test_the_context_of_diffusers_chooses_the_kernel(counted):
    model, inputs = random_model(SMALL), random_inputs(SMALL)
    plain = output(model, inputs)
    with attention_backend("_native_math"):
        assert relative_error(output(model, inputs), plain) < 1e-5
    assert len(counted) == 4
    assert torch.equal(output(model, inputs), plain)
    with (
        attention_backend("flex"),
        pytest.raises(ValueError, match=r"'flex' of diffusers.*nearest is 'native'"),
    ):
        output(model, inputs)


def test_names_of_diffusers_are_understood(counted):
    model, inputs = random_model(SMALL), random_inputs(SMALL)
    plain = output(model, inputs)
    model.set_attention_backend("_native_math")
    output(model, inputs)
    assert len(counted) == 4
    model.reset_attention_backend()
    assert torch.equal(output(model, inputs), plain)
    model.set_attention_backend("flash")
    assert {layer.backend for layer in model.modules() if isinstance(layer, WanAttention)} == {"flash"}
    model.set_attn_processor(TheirProcessor())  # which has a kernel of its own
    model.set_attention_backend("math")
    assert model.blocks[0].attn1.processor._attention_backend == "_native_math"
    for name, why in (
        ("sage_varlen", "the nearest is 'sage'"),
        ("_flash_3_hub", "'flash_attn_3' cannot be used on cpu"),
        ("nothing", "there is none of that name; available: .*native"),
    ):
        with pytest.raises(ValueError, match=why):
            model.set_attention_backend(name)


def test_every_name_of_diffusers_has_an_answer():
    for name in AttentionBackendName:
        try:
            ours = attention_names.our_name(name)
        except ValueError as error:
            assert "the nearest is" in str(error)
        else:
            assert ours in kernels.available("cpu")
    for name in kernels.available("cpu"):
        assert attention_names.their_name(name) in {one.value for one in AttentionBackendName}
