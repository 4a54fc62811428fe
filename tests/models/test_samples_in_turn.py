"""A batch whose samples go through each block in turn: the bits of calls one by one."""

import pytest
import torch

from tests.models.test_transformer import SMALL, WITH_IMAGE
from wan22 import WanTransformer3DModel

FRAMES = WITH_IMAGE | {"pos_embed_seq_len": 514}  # first and last frame: image tokens "2 s d" for a sample


@pytest.mark.parametrize("config", [SMALL, WITH_IMAGE, FRAMES], ids=["text", "image", "two images"])
@pytest.mark.parametrize("times", [(), (5,)], ids=["one time", "per frame"])
@torch.no_grad()
def test_each_sample_is_computed_as_by_itself(config, times):
    torch.manual_seed(0)
    model = WanTransformer3DModel(**config).eval()
    x, text = torch.randn(3, model.in_channels, 5, 12, 10), torch.randn(3, 512, 20)
    timestep, images = 1000 * torch.rand(3, *times), config.get("pos_embed_seq_len", 257) // 257
    image = None if config is SMALL else torch.randn(3, images, 257, 28)
    alone = [
        model(
            *(e[i : i + 1] for e in (x, timestep, text)),
            image if image is None else image[i],
            return_dict=False,
        )[0]
        for i in range(3)
    ]
    called = []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, args, i=i: called.append((i, len(args[0]))))
    model.set_samples_in_turn()
    image = image if image is None else image.flatten(0, 1)
    found = model(x, timestep, text, image, return_dict=False)[0]
    assert torch.equal(found, torch.cat(alone))
    assert called == [(i, 1) for i in range(len(model.blocks)) for _ in range(3)]
    model.set_samples_in_turn(False)
    model(x, timestep, text, image)
    assert called[3 * len(model.blocks) :] == [(i, 3) for i in range(len(model.blocks))]
