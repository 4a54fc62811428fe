"""What calls share is the same as what they would compute; the model itself keeps nothing."""

import pytest
import torch

from tests.golden_data import relative_error
from tests.models.test_transformer import SMALL, WITH_IMAGE, random_inputs, random_model
from wan22.models.reuse import PromptCache, TransformerCache, recall


@pytest.mark.parametrize("config", [SMALL, WITH_IMAGE], ids=["t2v", "2.1-i2v"])
def test_calls_with_a_cache_equal_calls_without(config):
    """At every step and with two prompts, to the last bit."""
    model, prompts = random_model(config), [random_inputs(config, seed=s) for s in (1, 2)]
    shared = TransformerCache()
    caches = [PromptCache(shared) for _ in prompts]
    for step in range(3):
        latents = torch.randn(prompts[0]["hidden_states"].shape)
        same = {"hidden_states": latents, "timestep": torch.tensor([900.0 - step])}
        for prompt, cache in zip(prompts, caches, strict=True):
            inputs = prompt | same
            with torch.no_grad():
                assert torch.equal(model(**inputs, cache=cache).sample, model(**inputs).sample)


def test_keys_and_values_are_computed_once_and_the_time_once_a_step():
    model, inputs = random_model(SMALL), random_inputs(SMALL)
    calls = []
    for name, module in model.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "text_embedder", "time_proj")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name.rsplit(".", 1)[-1]))
    shared = TransformerCache()
    caches = PromptCache(shared), PromptCache(shared)
    for step in range(3):
        inputs["timestep"] = torch.tensor([900.0 - step])
        for cache in caches:
            model(**inputs, cache=cache)
    layers = len(model.blocks)
    expected = {"to_k": 2 * layers, "to_v": 2 * layers, "text_embedder": 2, "time_proj": 3}
    assert {name: calls.count(name) for name in expected} == expected


@pytest.mark.parametrize("inference", [False, True])
def test_a_timestep_that_is_written_to_is_another(inference):
    """Where PyTorch counts what is written; tensors made in inference mode do not tell."""
    model, inputs = random_model(SMALL), random_inputs(SMALL)
    cache = PromptCache()
    with torch.inference_mode(inference):
        time = inputs["timestep"] = torch.tensor([900.0])
        model(**inputs, cache=cache)
        if not inference:
            time.fill_(100.0)
        with torch.no_grad():
            assert torch.equal(model(**inputs, cache=cache).sample, model(**inputs).sample)


def test_another_size_gets_its_own_rotary_tables():
    model, inputs = random_model(SMALL), random_inputs(SMALL)
    cache = PromptCache()
    with torch.no_grad():
        model(**inputs, cache=cache)
        inputs["hidden_states"] = torch.randn(*inputs["hidden_states"].shape[:3], 6, 10)
        assert torch.equal(model(**inputs, cache=cache).sample, model(**inputs).sample)


def test_one_time_per_latent_frame_equals_one_per_token():
    """Up to the embedder's rounding, which depends on its rows; TI2V-5B has time 0 in the first frame."""
    model, inputs = random_model(SMALL), random_inputs(SMALL)
    t, h, w = (n // p for n, p in zip(inputs["hidden_states"].shape[2:], model.patch_size, strict=True))
    times = torch.tensor([[0.0] + [700.0] * (t - 1)])
    with torch.no_grad():
        per_frame = model(**inputs | {"timestep": times}).sample
        per_token = model(**inputs | {"timestep": times.repeat_interleave(h * w, dim=1)}).sample
        alike = model(**inputs | {"timestep": times[:, 1:2]}).sample
    assert relative_error(per_frame, per_token) <= 1e-6
    assert not torch.allclose(per_frame, alike, atol=1e-3)


def test_recall_keeps_one_value_of_a_kind():
    cache, made = TransformerCache(), []

    def value(key):
        return recall(cache, "square", key, lambda: made.append(key) or key * key)

    assert [value(key) for key in (2, 2, 3, 2)] == [4, 4, 9, 4]
    assert made == [2, 3, 2]
    assert len(cache.kept) == 1
    assert recall(None, "square", 2, lambda: 5) == 5
