"""Rows of an autoencoder shared among ranks: what one rank encodes and decodes."""

import pytest
import torch

from tests.accel.parallel.ranks import on_ranks
from tests.builders import random_vae
from tests.tiers import slow
from wan22.accel import vae as acceleration
from wan22.accel.parallel.rows import RowParallel

BOUND = 1e-5
# Rows of latents: as many as 4 ranks share equally, and not; and fewer than they are.
ROWS = (8, 7, 3)


def off(found, expected):
    """Return the L2 norm of the difference over that of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


def cases():
    """Each VAE, as it is and accelerated, by numbers of latent rows."""
    for channels in (16, 48):
        vae = random_vae(0, channels)
        for accelerated in (False, True):
            if accelerated:
                acceleration.accelerate(vae)
            for rows in ROWS[accelerated : 2 if accelerated else None]:
                yield (channels, accelerated, rows), vae


def latents_of(channels, rows):
    return torch.randn(1, channels, 3, rows, 5, generator=torch.Generator().manual_seed(1))


def decoded(vae, z):
    return torch.cat(list(vae.decode_stream(z)), dim=2)


def errors(rank):
    """How far frames are off those of one rank; and whether a detached model decodes the same bits."""
    found = {}
    group = torch.distributed.group.WORLD
    for case, vae in cases():
        channels, _, rows = case
        z = latents_of(channels, rows)
        alone = decoded(vae, z)
        shared = RowParallel(vae, group)
        found[case] = off(decoded(vae, z), alone)
        with torch.no_grad():
            found[case, "whole"] = off(vae.decode(z, chunk_latents=None).sample, alone)
        with shared.to_first():
            own = decoded(vae, z)
        if rank == 0:
            found[case, "first"] = off(own, alone)
        else:  # this rank's rows, where there are enough
            found[case, "first"] = float((own.shape[3] < alone.shape[3]) != (rows >= shared.ranks))
        shared.detach()
        found[case, "detached"] = float(not torch.equal(decoded(vae, z), alone))
    for channels in (16, 48):  # accelerated while shared: what sees beyond its rows must go on to
        vae, z = random_vae(0, channels), latents_of(channels, ROWS[1])
        alone = decoded(vae, z)
        shared = RowParallel(vae, group)
        acceleration.accelerate(vae)
        found[channels, "later"] = off(decoded(vae, z), alone)
        shared.detach()
    return found


@pytest.mark.parametrize("count", [2, *slow([4])])
def test_decoding(count):
    for found in on_ranks(count, errors):
        assert len(found) == 2 * (4 * (len(ROWS) + 1) + 1)
        wrong = {case: value for case, value in found.items() if not value <= BOUND}
        assert not wrong


def clips(stride, rows):
    """A moving clip; and one that stands still after a first frame that only the uppermost rank sees."""
    shape = 1, 3, 21, rows * stride, 3 * stride
    moving = torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    still = moving.clone()
    still[:, :, 1:] = 0
    still[:, :, 0, stride // 2 :] = 0
    return {"moving": moving, "still": still}


def encoded(vae, x):
    with torch.no_grad():
        return vae.encode(x, return_dict=False)[0].parameters


def encoding_errors(rank):
    """How far moments are off those of one rank, and whether as many chunks were encoded whole."""
    found = {}
    for (channels, accelerated, rows), vae in cases():
        for name, x in clips(vae.spatial_stride, rows).items():
            case = channels, accelerated, rows, name
            alone = encoded(vae, x)
            shared = RowParallel(vae, torch.distributed.group.WORLD)
            ran = []
            handle = vae.encoder.conv_in.register_forward_hook(lambda *_: ran.append(1))  # noqa: B023
            found[case] = off(encoded(vae, x), alone)
            handle.remove()
            # Of six chunks the first, zeros, and zeros again once its first layer has seen no other.
            found[case, "ran"] = float(len(ran) != {"moving": 6, "still": 3}[name])
            stream = torch.cat([p.parameters for p in vae.encode_stream(x.split(3, 2))], 2)
            found[case, "stream"] = off(stream, alone)
            with torch.no_grad():
                whole = vae.encode(x, return_dict=False, chunk_latents=None)[0].parameters
            found[case, "whole"] = off(whole, alone)
            shared.detach()
            found[case, "detached"] = float(not torch.equal(encoded(vae, x), alone))
    return found


@pytest.mark.parametrize("count", [2, *slow([4])])
def test_encoding(count):
    for found in on_ranks(count, encoding_errors):
        assert len(found) == 2 * 2 * 5 * (len(ROWS) + 1)
        wrong = {case: value for case, value in found.items() if not value <= BOUND}
        assert not wrong


def strips_and_tiles(rank):
    vae, z = random_vae(0), torch.randn(1, 16, 2, 40, 4, generator=torch.Generator().manual_seed(1))
    alone = torch.cat(list(vae.decode_stream(z)), dim=2)
    shared = RowParallel(vae, torch.distributed.group.WORLD)
    vae.enable_strips(2)
    found = [off(torch.cat(list(vae.decode_stream(z)), dim=2), alone)]
    x = clips(vae.spatial_stride, 6)["still"]
    encoded_in_strips = encoded(vae, x)
    vae.disable_strips()
    found.append(off(encoded_in_strips, encoded(vae, x)))
    with pytest.raises(ValueError, match="compiled, or its rows are shared already"):
        RowParallel(vae, torch.distributed.group.WORLD)
    shared.detach()
    return found


def test_strips_are_each_ranks_own():
    for found in on_ranks(2, strips_and_tiles):
        assert max(found) <= BOUND
