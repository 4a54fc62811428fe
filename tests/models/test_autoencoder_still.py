"""Clips that stand still, of which the encoder computes only what changes."""

import pytest
import torch

from tests.models.vaes import FAMILIES, random_video, relative_error, tiny_vae
from wan22.models.temporal_cache import TemporalCache

both_families = pytest.mark.parametrize("family", FAMILIES)


def _still_pieces(vae, frames, last, h=2, w=1):
    """An image, zeros, and on demand another image, as WanI2VPipeline gives them, and the whole clip."""
    image, other = random_video(vae, 1, 2, h, w)[:, :, :2].split(1, dim=2)
    zeros = torch.zeros_like(image)
    between = frames - 1 - last
    sizes = [min(4, between - i) for i in range(0, between, 4)]
    pieces = [image, *(zeros.expand(-1, -1, n, -1, -1) for n in sizes), *[other] * last]
    return pieces, torch.cat(pieces, dim=2)


def _encode_every_chunk(vae, x):
    """What `encode` and `encode_stream` give if they compute every chunk."""
    cache = TemporalCache()
    chunks = [x[:, :, :1], *x[:, :, 1:].split(vae.temporal_stride, dim=2)]
    encoded = [vae.encode_chunk(chunk, cache) for chunk in chunks]
    # Its rounding may depend on how many frames it gets.
    return vae.quant_conv(torch.cat(encoded, dim=2)), torch.cat(list(map(vae.quant_conv, encoded)), dim=2)


def _streamed(vae, pieces):
    return torch.cat([posterior.parameters for posterior in vae.encode_stream(pieces)], dim=2)


def _count_calls(modules):
    calls = []
    for module in modules:
        module.register_forward_hook(lambda module, *_: calls.append(module))
    return calls


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both_families
def test_a_still_clip_is_encoded_bit_by_bit_as_any(family, dtype, last):
    vae = tiny_vae(family, dtype)
    pieces, x = _still_pieces(vae, 81, last)
    clip, stream = _encode_every_chunk(vae, x)
    calls = _count_calls([vae.encoder.conv_in, vae.encoder.conv_out])
    with torch.no_grad():
        assert torch.equal(vae.encode(x).latent_dist.parameters, clip)
    # The first layer runs for the image, the first zeros and the second ones that show that it has settled.
    assert calls.count(vae.encoder.conv_in) == 3 + last
    assert calls.count(vae.encoder.conv_out) == 21
    assert torch.equal(_streamed(vae, iter(pieces)), stream)
    assert calls.count(vae.encoder.conv_in) == 2 * (3 + last)


@pytest.mark.parametrize("strips", [2, 9])
@both_families
def test_a_still_clip_in_strips(family, strips):
    """Each resolution that is computed in strips settles as a whole."""
    vae = tiny_vae(family)
    pieces, x = _still_pieces(vae, 81, 1, h=6)
    _, stream = _encode_every_chunk(vae, x)
    vae.enable_strips(strips)
    every = vae.encode(x, chunk_latents=None).latent_dist.parameters
    calls = _count_calls([vae.encoder.conv_in])
    found = _streamed(vae, iter(pieces))
    assert relative_error(found, every) <= 1e-5
    assert relative_error(found, stream) <= 1e-5
    assert len(calls) < strips * 12


@both_families
def test_a_clip_that_stops_and_goes_is_encoded_bit_by_bit_as_any(family):
    vae = tiny_vae(family, dim_mult=[2, 2], temperal_downsample=[True])
    first, still, *moving, other = random_video(vae, 1, 6, 2, 1).tensor_split([1, 3, 5, 7, 9], dim=2)
    x = torch.cat([first, *[still] * 9, *moving, *[still] * 2, *moving, *[other] * 9, still, still], dim=2)
    _, stream = _encode_every_chunk(vae, x)
    assert torch.equal(_streamed(vae, [x]), stream)


def test_a_still_clip_stops_computing_all_but_the_last_layers():
    vae = tiny_vae("2.1")
    pieces, _ = _still_pieces(vae, 401, 0)
    calls = _count_calls(vae.encoder.modules())
    stream = vae.encode_stream(iter(pieces))
    for _ in range(100):
        next(stream)
    calls.clear()
    next(stream)
    assert calls == [vae.encoder]


def test_pieces_may_lie_in_one_buffer():
    vae = tiny_vae("2.1")
    video = random_video(vae, 1, 5, 1, 1)
    # All that the first layer remembers of a piece is in its last two frames.
    video[:, :, 1:].unflatten(2, (4, 4))[:, :, :, 2:] = 0
    buffer = torch.empty_like(video[:, :, :4])

    def refilled():
        yield video[:, :, :1]
        for piece in video[:, :, 1:].split(4, dim=2):
            yield buffer.copy_(piece)

    assert torch.equal(_streamed(vae, refilled()), _encode_every_chunk(vae, video)[1])


@both_families
def test_gradients_of_a_still_clip_are_those_of_the_whole(family):
    vae = tiny_vae(family, torch.float64).requires_grad_(True)
    x = _still_pieces(vae, 41, 0)[1].requires_grad_(True)

    def gradients(chunk):
        latents = vae.encode(x, chunk_latents=chunk).latent_dist.mode()
        return torch.autograd.grad(latents.square().mean(), [x, *vae.encoder.parameters()])

    for chunked, whole in zip(gradients(1), gradients(None), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-9, atol=1e-14)
