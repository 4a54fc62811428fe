"""The tiny decoder: its arithmetic by a slow formula, frame counts, pieces, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from wan22.models.tiny_autoencoder import TinyDecoder

WIDTHS = (12, 8, 6, 4)


def tiny_decoder(seed=0, **options):
    torch.manual_seed(seed)
    decoder = TinyDecoder(**{"latent_channels": 5, "patch_size": 2, "widths": WIDTHS} | options).eval()
    with torch.no_grad():
        decoder.decoder[22].bias.add_(0.5)  # or most pixels would be clamped to black
    return decoder


def latents(frames=3, seed=1):
    return 2 * torch.randn(5, frames, 3, 4, generator=torch.Generator().manual_seed(seed))


def slow(decoder, z):
    """The same by frames of Python lists, a block at a time, from the weights' official names."""
    w = decoder.state_dict()

    def conv(x, name):
        return F.conv2d(x[None], w[f"{name}.weight"], w.get(f"{name}.bias"), padding=1)[0]

    def block(frames, name):
        done = []
        for i, x in enumerate(frames):
            past = frames[i - 1] if i else torch.zeros_like(x)
            y = conv(torch.cat([x, past]), f"{name}.conv.0").relu()
            y = conv(conv(y, f"{name}.conv.2").relu(), f"{name}.conv.4")
            done.append((y + x).relu())
        return done

    frames = [conv(3 * torch.tanh(z[:, t] / 3), "decoder.1").relu() for t in range(z.shape[1])]
    for start, factor in ((3, 1), (9, 2), (15, 2)):
        for i in range(start, start + 3):
            frames = block(frames, f"decoder.{i}")
        grown = []
        for x in frames:
            x = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
            mixed = torch.einsum("oc,chw->ohw", w[f"decoder.{start + 4}.conv.weight"][:, :, 0, 0], x)
            grown += [conv(part, f"decoder.{start + 5}") for part in mixed.chunk(factor)]
        frames = grown
    pictures = []
    for x in frames:
        y, p = conv(x.relu(), "decoder.22"), decoder.patch_size
        picture = torch.empty(3, y.shape[1] * p, y.shape[2] * p)
        for c in range(3):
            for row in range(p):
                for column in range(p):
                    picture[c, row::p, column::p] = y[c * p * p + row * p + column]
        pictures.append(picture.clamp(0, 1))
    return torch.stack(pictures[3:], dim=1)


@pytest.mark.parametrize("patch_size", [1, 2])
@torch.no_grad()
def test_it_computes_what_the_formula_says(patch_size):
    decoder, z = tiny_decoder(patch_size=patch_size), latents()
    expected = slow(decoder, z)
    assert expected.std() > 0.05 and expected.min() >= 0 and expected.max() <= 1
    torch.testing.assert_close(decoder(z), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 5])
@torch.no_grad()
def test_frames_and_sizes(frames):
    pixels = tiny_decoder()(latents(frames))
    assert pixels.shape == (3, 1 + 4 * (frames - 1), 3 * 16, 4 * 16)


@torch.no_grad()
def test_pieces_are_the_whole():
    """Frame by frame with a memory is what one pass over all frames gives."""
    decoder, z = tiny_decoder(), latents(4)
    whole, _ = decoder.decode_next(z.transpose(0, 1), {})
    pieces = list(decoder.stream(z))
    assert [piece.shape[1] for piece in pieces] == [1, 4, 4, 4]
    torch.testing.assert_close(torch.cat(pieces, 1), whole[3:].transpose(0, 1), rtol=0, atol=1e-6)


@torch.no_grad()
def test_nothing_looks_ahead_and_everything_looks_back():
    decoder, z = tiny_decoder(), latents(4)
    changed = z.clone()
    changed[:, 1] += 1
    difference = (decoder(z) - decoder(changed)).abs().amax(dim=(0, 2, 3))
    assert not difference[:1].any()
    assert (difference[1:5] > 0).all()
    assert difference[5:9].max() > 0  # through the memory alone


@torch.no_grad()
def test_no_state_stays_behind():
    decoder = tiny_decoder()
    first = decoder(latents(seed=1))
    decoder(latents(seed=2))
    assert torch.equal(decoder(latents(seed=1)), first)


def test_released_sizes():
    """Parameters, by the official names and shapes, of taew2_1 and taew2_2."""
    with torch.device("meta"):
        large, patched = TinyDecoder(), TinyDecoder(48, 2)
    shapes = {name: tuple(tensor.shape) for name, tensor in large.state_dict().items()}
    assert shapes["decoder.1.weight"] == (256, 16, 3, 3)
    assert shapes["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert shapes["decoder.7.conv.weight"] == (256, 256, 1, 1)
    assert shapes["decoder.13.conv.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.14.weight"] == (64, 128, 3, 3) and "decoder.14.bias" not in shapes
    assert shapes["decoder.22.bias"] == (3,)
    assert len(shapes) == 2 + 9 * 6 + 3 * 2 + 2
    assert patched.state_dict()["decoder.1.weight"].shape[1] == 48
    assert patched.state_dict()["decoder.22.bias"].shape == (12,)


def test_other_latents_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 3, 3, 4\); they must be \(5, t, h, w\)"):
        tiny_decoder()(latents()[:4])
    with pytest.raises(ValueError, match="they must be"):
        tiny_decoder()(latents()[None])
