"""The objective against a formula written sample by sample in float64."""

import numpy as np
import pytest
import torch

from wan22 import WanTransformer3DModel
from wan22.training.objective import Batch, losses, weights_of
from wan22.training.timesteps import Timesteps

CONFIG = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "text_dim": 8, "ffn_dim": 16}
CONFIG |= {"freq_dim": 32}


def model_of(in_channels, out_channels):
    torch.manual_seed(0)
    return WanTransformer3DModel(**CONFIG, in_channels=in_channels, out_channels=out_channels).double()


def batch_of(channels, condition=0, given=None):
    random = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    latents, text, noise = draw(3, channels, 3, 4, 6), draw(3, 7, 8), draw(3, channels, 3, 4, 6)
    first = None if given is None else torch.tensor(given)
    extra = draw(3, condition, 3, 4, 6) if condition else None
    return Batch(latents, text, extra, first_given=first), noise


def by_hand(model, batch, noise, sigma):
    """Return each sample's loss, frame by frame, in NumPy; the model is asked sample by sample."""
    found = []
    for i, level in enumerate(sigma.tolist()):
        x0, e = batch.latents[i].numpy(), noise[i].numpy()
        levels = np.full(x0.shape[1], level)
        if batch.first_given is not None and batch.first_given[i]:
            levels[0] = 0.0
        x = np.stack([x0[:, t] + levels[t] * (e[:, t] - x0[:, t]) for t in range(len(levels))], axis=1)
        given = [] if batch.condition is None else [batch.condition[i].numpy()]
        inputs = torch.from_numpy(np.concatenate([x, *given]))[None]
        times = torch.from_numpy(1000 * levels)[None]
        with torch.no_grad():
            v = model(inputs, times, batch.text[i : i + 1], return_dict=False)[0][0].numpy()
        noisy = [t for t in range(len(levels)) if levels[t] > 0]
        found.append(np.mean([np.mean((v[:, t] + x0[:, t] - e[:, t]) ** 2) for t in noisy]))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    ("channels", "condition", "given"),
    [(16, 0, None), (16, 20, None), (48, 0, (True, False, True)), (48, 0, (False, False, False))],
)
def test_losses_are_those_of_the_formula(channels, condition, given):
    model, sigma = model_of(channels + condition, channels), torch.tensor([0.2, 0.93, 0.5]).double()
    batch, noise = batch_of(channels, condition, given)
    expected = by_hand(model, batch, noise, sigma)
    torch.testing.assert_close(losses(model, batch, noise, sigma), expected, rtol=1e-10, atol=0)


def test_gradients_are_those_of_the_formula():
    """One step's gradients against finite differences of the formula by hand."""
    model, sigma = model_of(16, 16), torch.tensor([0.2, 0.93, 0.5]).double()
    batch, noise = batch_of(16)
    losses(model, batch, noise, sigma).mean().backward()
    for name in ("blocks.0.attn1.to_q.weight", "blocks.1.ffn.net.2.weight", "proj_out.bias"):
        parameter = model.get_parameter(name)
        place = (0,) * parameter.ndim
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter[place] += step
                values.append(by_hand(model, batch, noise, sigma).mean().item())
                parameter[place] -= step
        slope = (values[0] - values[1]) / 2e-5
        assert parameter.grad[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-9), name


def test_weights_have_mean_one_over_the_noise_levels_of_a_run():
    timesteps = Timesteps(shift=5.0, high=0.875)
    sigma = timesteps.sample(0, range(4096))
    assert torch.equal(weights_of("none", sigma, timesteps), torch.ones_like(sigma))
    bell = weights_of("bell", sigma, timesteps)
    assert bell.mean().item() == pytest.approx(1, abs=1e-3)
    ends = weights_of("bell", torch.tensor([0.0, 0.5, 1.0]).double(), timesteps)
    assert ends[0].abs() < 1e-12 and ends[2].abs() < 1e-12 and ends[1] > 1
