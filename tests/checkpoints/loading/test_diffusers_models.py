"""What else scripts use of diffusers' models: attributes of the VAE, the transformer's rope, public names."""

import diffusers
import pytest
import torch

from tests.builders import random_vae
from tests.golden_data import relative_error
from tests.models.test_transformer import SMALL, random_inputs, random_model
from wan22 import AutoencoderKLWan, WanTransformer3DModel


def of_diffusers(model):
    theirs = getattr(diffusers, type(model).__name__).from_config(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


@pytest.mark.parametrize("cls", [AutoencoderKLWan, WanTransformer3DModel])
def test_every_public_name_of_diffusers_is_here(cls):
    sizes = {"base_dim": 3, "num_res_blocks": 1} if cls is AutoencoderKLWan else SMALL
    theirs, ours = getattr(diffusers, cls.__name__)(**sizes), cls(**sizes)
    # How diffusers blends its tiles.
    missing = {name for name in dir(theirs) if not name.startswith("_")} - set(dir(ours))
    assert missing <= {"blend_h", "blend_v"}


@pytest.mark.parametrize("channels", [16, 48])
def test_attributes_of_the_vae(channels):
    ours = random_vae(2, channels)
    theirs = of_diffusers(ours)
    for name in ("spatial_compression_ratio", "temperal_downsample", "temperal_upsample"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.temporal_compression_ratio == 4
    ours.clear_cache()


@torch.no_grad()
def test_tiles_without_enabling_them():
    vae = random_vae(2)
    x, z = torch.randn(1, 3, 5, 64, 48).clamp(-1, 1), torch.randn(1, 16, 2, 8, 6)
    whole = vae.encode(x).latent_dist.parameters, vae.decode(z).sample
    vae.enable_tiling(32, 32, 16, 16)
    tiled = vae.encode(x).latent_dist.parameters, vae.decode(z).sample
    vae.disable_tiling()
    assert torch.equal(vae.tiled_encode(x), tiled[0])
    assert torch.equal(vae.tiled_decode(z).sample, tiled[1])
    assert torch.equal(vae.tiled_decode(z, return_dict=False)[0], tiled[1])
    assert not vae.use_tiling
    assert torch.equal(vae.decode(z).sample, whole[1])
    assert not torch.equal(tiled[0], whole[0])


@torch.no_grad()
def test_the_rope_of_a_caller_is_what_runs():
    """Scripts for longer or larger videos put their own in its place, or patch it."""
    model, inputs = random_model(SMALL), random_inputs(SMALL)
    theirs = of_diffusers(model)
    tables = (one.rope(inputs["hidden_states"]) for one in (model, theirs))
    for ours, expected in zip(*tables, strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)
    plain = model(**inputs).sample

    class Slower(torch.nn.Module):
        def __init__(self, rope):
            super().__init__()
            self.rope = rope

        def forward(self, hidden_states):
            cos, sin = self.rope(hidden_states)
            angle = torch.atan2(sin, cos) / 2
            return angle.cos(), angle.sin()

    model.rope, theirs.rope = Slower(model.rope), Slower(theirs.rope)
    found = model(**inputs).sample
    assert relative_error(found, theirs(**inputs).sample) < 1e-5
    assert relative_error(found, plain) > 1e-4


def test_sharing_tokens_as_in_diffusers_is_refused():
    with pytest.raises(ValueError, match=r"wan22\.accel\.parallel\.parallelize\(pipe, ulysses=2\)"):
        random_model(SMALL).enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
