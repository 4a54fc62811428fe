"""What the other tests hold on CPUs, on GPUs: one video on two of them is that of one."""

import pytest
import torch

from tests.accel.features import FORMS, frames, own
from tests.accel.parallel.ranks import on_ranks
from tests.golden_data import relative_error
from wan22.accel.parallel import parallelize, processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
LAYOUTS = ({"ulysses": 2}, {"ring": 2}, {"cfg": 2})


def together(rank, form):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = processes.own_device()
    expected = frames(own(form).to(device), form)
    found = {}
    for layout in LAYOUTS:
        for fsdp in (False, True):
            pipe = own(form)  # on the CPU: it goes where it belongs
            parallel = parallelize(pipe, **layout, fsdp=fsdp)
            assert pipe.vae.device == pipe.transformer.device == pipe.text_encoder.device == device
            found[str(layout), fsdp] = relative_error(frames(pipe, form), expected)
            parallel.detach()
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_call(form):
    for found in on_ranks(2, together, form, backend="nccl"):
        wrong = {case: value for case, value in found.items() if not value <= 1e-5}
        assert not wrong and len(found) == 2 * len(LAYOUTS)
