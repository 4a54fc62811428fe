"""The autoencoder in slices, tiles and strips."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.vaes import (
    FAMILIES,
    PeakMemory,
    make_pointwise,
    random_latents,
    random_video,
    relative_error,
    tiny_vae,
)
from tests.tiers import slow

both_families = pytest.mark.parametrize("family", FAMILIES)

# Tiles and slices.


@both_families
def test_slicing_equals_a_batch(family):
    vae = tiny_vae(family, torch.float64)
    x, z = random_video(vae, 3, 2, 1, 2), random_latents(vae, 3, 2, 1, 2)
    moments, sample = vae.encode(x).latent_dist.parameters, vae.decode(z).sample
    batches = []
    vae.decoder.register_forward_hook(lambda _, args, __: batches.append(args[0].shape[0]))
    vae.enable_slicing()
    assert relative_error(vae.encode(x).latent_dist.parameters, moments) <= 1e-13
    assert relative_error(vae.decode(z).sample, sample) <= 1e-13
    assert set(batches) == {1}
    vae.disable_slicing()
    vae.decode(z)
    assert batches[-1] == 3


@pytest.mark.parametrize("cells", [(3, 3), (5, 4), (7, 6), (2, 9)])
@both_families
def test_tiles_are_put_where_they_belong(family, cells):
    vae = make_pointwise(tiny_vae(family, torch.float64))
    x, z = random_video(vae, 1, 2, *cells), random_latents(vae, 1, 2, *cells)
    moments, sample = vae.encode(x).latent_dist.parameters, vae.decode(z).sample
    assert sample.std() > 0.01
    s = vae.spatial_stride
    vae.enable_tiling(3 * s, 3 * s, 2 * s, 2 * s)
    assert relative_error(vae.encode(x).latent_dist.parameters, moments) <= 1e-12
    assert relative_error(vae.decode(z).sample, sample) <= 1e-12


@both_families
def test_a_constant_has_no_seams(family):
    vae = make_pointwise(tiny_vae(family))
    s = vae.spatial_stride
    vae.enable_tiling(3 * s, 3 * s, 2 * s, 2 * s)
    z = random_latents(vae, 1, 2, 1, 1).expand(-1, -1, -1, 6, 7)
    cells = vae.decode(z).sample.unflatten(4, (7, s)).unflatten(3, (6, s))  # b c t 6 s 7 s
    assert (cells - cells[:, :, :, :1, :, :1]).abs().max() <= 1e-6
    x = torch.full((1, 3, 5, 6 * s, 7 * s), 0.3)
    moments = vae.encode(x).latent_dist.parameters
    assert (moments - moments[..., :1, :1]).abs().max() <= 1e-6 * moments.abs().max()


@both_families
def test_tiling_stays_near_the_whole_and_larger_overlaps_nearer(family):
    vae = tiny_vae(family)
    x, z = random_video(vae, 1, 2, 8, 10), random_latents(vae, 1, 2, 8, 10)
    moments, sample = vae.encode(x).latent_dist.mode(), vae.decode(z).sample
    s = vae.spatial_stride
    errors = []
    for size, stride in ((4, 2), (7, 3)):
        vae.enable_tiling(size * s, size * s, stride * s, stride * s)
        encode_error = relative_error(vae.encode(x).latent_dist.mode(), moments)
        errors.append((encode_error, relative_error(vae.decode(z).sample, sample)))
    assert all(near < far for near, far in zip(errors[1], errors[0], strict=True)), errors
    assert max(errors[0]) <= 0.6 and max(errors[1]) <= 0.3, errors
    vae.disable_tiling()
    assert torch.equal(vae.decode(z).sample, sample)


# Strips.


@pytest.mark.parametrize("rows", [1, 7, *slow([2, 12])])
@both_families
def test_strips_equal_the_whole(family, rows):
    vae = tiny_vae(family, torch.float64)
    x, z = random_video(vae, 2, 3, rows, 1), random_latents(vae, 2, 3, rows, 1)
    for chunk in (1, 2, None):
        vae.disable_strips()
        moments = vae.encode(x, chunk_latents=chunk).latent_dist.parameters
        sample = vae.decode(z, chunk_latents=chunk).sample
        # At most as many as rows allow.
        for strips in (2, 3, 1000):
            vae.enable_strips(strips)
            found = vae.encode(x, chunk_latents=chunk).latent_dist.parameters
            assert relative_error(found, moments) <= 1e-13
            assert relative_error(vae.decode(z, chunk_latents=chunk).sample, sample) <= 1e-13
            if chunk is not None:
                pieces = [posterior.parameters for posterior in vae.encode_stream([x], chunk)]
                assert relative_error(torch.cat(pieces, dim=2), moments) <= 1e-13
                assert relative_error(torch.cat(list(vae.decode_stream(z, chunk)), dim=2), sample) <= 1e-13
    vae.disable_strips()
    assert torch.equal(vae.decode(z, chunk_latents=None).sample, sample)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_res_blocks": 3},
        {"dim_mult": [2], "temperal_downsample": [], "base_dim": 6, "is_residual": False},
        {"dim_mult": [2, 2], "temperal_downsample": [True]},
        {"temperal_downsample": [True, True, False]},  # the last doubling doubles time, too
        {"attn_scales": [0.5], "is_residual": False},  # attention sees whole frames
    ],
)
@both_families
def test_strips_of_deeper_flatter_and_other_models(family, changes):
    vae = tiny_vae(family, torch.float64, **changes)
    z = random_latents(vae, 1, 3, 64 // vae.spatial_stride, 1)
    x = random_video(vae, 1, 3, 64 // vae.spatial_stride, 1)
    sample, moments = vae.decode(z).sample, vae.encode(x).latent_dist.parameters
    for strips in (3, 1000):
        vae.enable_strips(strips)
        assert relative_error(vae.decode(z).sample, sample) <= 1e-13
        assert relative_error(vae.encode(x).latent_dist.parameters, moments) <= 1e-13


@both_families
def test_gradients_of_strips_are_those_of_the_whole(family):
    vae = tiny_vae(family, torch.float64).requires_grad_(True)
    x = random_video(vae, 1, 2, 4, 1).requires_grad_(True)

    def gradients():
        loss = vae.decode(vae.encode(x).latent_dist.mode()).sample.square().mean()
        return torch.autograd.grad(loss, [x, *vae.encoder.parameters(), *vae.decoder.parameters()])

    whole = gradients()
    vae.enable_strips(3)
    for strips, expected in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(strips, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("coder", ["encoder", "decoder"])
@both_families
def test_strips_compute_nothing_twice(family, coder):
    """But for the upsamplers' rows at the edges of strips; counted at a width that matters."""
    vae = tiny_vae(family).to("meta")
    z, x = (f(vae, 1, 2, 44, 1).to("meta") for f in (random_latents, random_video))

    def flops():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.decode(z) if coder == "decoder" else vae.encode(x)
        return counter.get_total_flops()

    whole = flops()
    for strips, most in ((4, 1.03), (16, 1.1)):
        vae.enable_strips(strips)
        assert whole <= flops() <= (most if coder == "decoder" else 1) * whole


@both_families
def test_strips_take_less_memory_flat_in_the_number_of_frames(family):
    # Wide enough that activations, not pixels, take the memory.
    vae = tiny_vae(family, base_dim=16, decoder_base_dim=16)

    def peak(latent_frames):
        with PeakMemory() as memory:
            for _ in vae.decode_stream(random_latents(vae, 1, latent_frames, 16, 2)):
                pass
        return memory.peak

    whole = peak(3)
    vae.enable_strips()
    assert peak(3) <= 0.75 * whole
    assert peak(9) - peak(3) <= 3 * random_latents(vae, 1, 6, 16, 2).nbytes


def test_strips_and_tiles_exclude_each_other():
    vae = tiny_vae("2.1")
    with pytest.raises(ValueError, match="strips=0 must be an int, at least 1"):
        vae.enable_strips(0)
    vae.enable_strips()
    assert (vae.use_strips, vae.num_strips) == (True, 4)
    with pytest.raises(ValueError, match=r"strips are enabled.*disable_strips\(\)"):
        vae.enable_tiling()
    vae.disable_strips()
    vae.enable_tiling()
    with pytest.raises(ValueError, match=r"tiling is enabled.*disable_tiling\(\)"):
        vae.enable_strips(2)
    assert not vae.use_strips


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tile_sample_min_height": 100}, "tile_sample_min_height=100 .*multiple of 16.*96 and 112"),
        ({"tile_sample_stride_width": 0}, "tile_sample_stride_width=0 .*are 16 and 32"),
        ({"tile_sample_min_width": 128}, "tile_sample_stride_width is 192.*at most.*128"),
    ],
)
def test_tile_sizes_that_cannot_be(sizes, message):
    vae = tiny_vae("2.2")
    with pytest.raises(ValueError, match=message):
        vae.enable_tiling(**sizes)
    assert not vae.use_tiling
    assert vae.tile_sample_min_height == vae.tile_sample_min_width == 256
