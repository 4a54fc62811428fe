"""The accelerated autoencoder beside the plain one."""

import accelerate as hf_accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from torch import nn
from torch.nn import functional

from tests.models.vaes import FAMILIES, PeakMemory, random_latents, random_video, relative_error, tiny_vae
from wan22 import AutoencoderKLWan
from wan22.accel import vae as module
from wan22.accel.vae import SubpixelConv2d, accelerate, detach
from wan22.models.autoencoder_layers import CausalConv3d
from wan22.models.temporal_cache import TemporalCache

both_families = pytest.mark.parametrize("family", FAMILIES)


def _results(vae, x, z, chunk=1):
    moments = vae.encode(x, chunk_latents=chunk).latent_dist.parameters
    return moments, vae.decode(z, chunk_latents=chunk).sample


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 7)])
def test_subpixel_convolution_equals_doubling_and_convolving(size):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=1, dtype=torch.float64)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    doubled = nn.Upsample(scale_factor=2.0, mode="nearest-exact")(x)
    torch.testing.assert_close(SubpixelConv2d(conv)(x), conv(doubled), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@both_families
def test_accelerated_is_within_its_bound_and_detached_is_plain(family, dtype, bound):
    vae = tiny_vae(family, dtype)
    x, z = random_video(vae, 2, 3, 3, 2), random_latents(vae, 2, 3, 3, 2)
    for chunk in (1, 2, None):
        plain = _results(vae, x, z, chunk)
        accelerate(vae)
        for fast, reference in zip(_results(vae, x, z, chunk), plain, strict=True):
            assert 0 < relative_error(fast, reference) <= bound
        detach(vae)
        assert all(torch.equal(a, b) for a, b in zip(_results(vae, x, z, chunk), plain, strict=True))


@both_families
def test_in_bfloat16_it_is_as_near_to_the_exact_result_as_plain(family):
    exact, vae = tiny_vae(family, torch.float64), tiny_vae(family, torch.bfloat16)
    x, z = random_video(vae, 1, 3, 3, 2), random_latents(vae, 1, 3, 3, 2)
    references = _results(exact, x.double(), z.double())
    plain = _results(vae, x, z)
    accelerate(vae)
    for fast, slow, reference in zip(_results(vae, x, z), plain, references, strict=True):
        assert relative_error(fast, reference) <= 1.1 * relative_error(slow, reference)


def see_convolved(vae, note, monkeypatch):
    """Call a function with the frames of every causal convolution."""
    causal = [module.weight for module in vae.modules() if isinstance(module, CausalConv3d)]
    convolve = functional.conv3d

    def spy(x, weight, *rest, **options):
        if any(weight is other for other in causal):
            note(x)
        return convolve(x, weight, *rest, **options)

    monkeypatch.setattr(functional, "conv3d", spy)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="on a CPU without instructions for bf16, convolutions return any layout",
)
@both_families
def test_activations_have_the_layout(family, monkeypatch):
    # In bfloat16, as float32 convolutions of this size return any layout.
    vae = tiny_vae(family, torch.bfloat16)
    accelerate(vae)
    layouts = []

    def note(tensor):
        layouts.append(tensor.is_contiguous(memory_format=torch.channels_last_3d))

    see_convolved(vae, note, monkeypatch)
    for block in (*vae.encoder.down_blocks, *vae.decoder.up_blocks):
        block.register_forward_hook(lambda module, args, output: note(output))
    _results(vae, random_video(vae, 1, 2, 4, 4), random_latents(vae, 1, 2, 4, 4))
    assert len(layouts) > 40
    assert all(layouts)


def test_the_first_frame_is_not_convolved_with_the_zeros_before_it(monkeypatch):
    vae = tiny_vae("2.1")
    z = random_latents(vae, 1, 2, 1, 1)
    lengths = []
    see_convolved(vae, lambda x: lengths.append(x.shape[2]), monkeypatch)
    next(vae.decode_stream(z))
    assert set(lengths) == {3}
    lengths.clear()
    accelerate(vae)
    next(vae.decode_stream(z))
    assert not lengths


@both_families
def test_streams_strips_and_chunks_are_as_ever(family):
    vae = tiny_vae(family)
    z = random_latents(vae, 1, 3, 5, 2)
    accelerate(vae)
    sample = vae.decode(z).sample
    assert torch.equal(torch.cat(list(vae.decode_stream(z)), dim=2), sample)
    assert relative_error(vae.decode(z, chunk_latents=None).sample, sample) <= 1e-5
    vae.enable_strips(3)
    assert relative_error(vae.decode(z).sample, sample) <= 1e-5


def test_attaching_twice_and_detaching_plain_change_nothing():
    vae = tiny_vae("2.1")
    names = [name for name, _ in vae.named_modules()]
    detach(vae)
    accelerate(vae)
    fast = [type(module) for module in vae.modules()]
    accelerate(vae)
    assert [type(module) for module in vae.modules()] == fast
    detach(vae)
    assert [name for name, _ in vae.named_modules()] == names
    assert all(parameter.is_contiguous() for parameter in vae.parameters())


def test_weights_are_saved_and_loaded_under_their_names(tmp_path):
    vae = tiny_vae("2.2")
    state = {key: value.clone() for key, value in vae.state_dict().items()}
    z = random_latents(vae, 1, 2, 2, 2)
    sample = vae.decode(z).sample
    accelerate(vae)
    assert vae.state_dict().keys() == state.keys()
    vae.save_pretrained(tmp_path)
    assert torch.equal(AutoencoderKLWan.from_pretrained(tmp_path).decode(z).sample, sample)
    # New weights count from the next `accelerate` on, whichever they replace.
    vae.load_state_dict({key: value * 1.5 for key, value in state.items()}, assign=True)
    accelerate(vae)
    detach(vae)
    assert all(torch.equal(vae.state_dict()[key], value * 1.5) for key, value in state.items())


def test_it_compiles_without_graph_breaks():
    vae = tiny_vae("2.2", dim_mult=[2, 2], temperal_downsample=[True], scale_factor_temporal=2)
    accelerate(vae)
    torch._dynamo.reset()
    decode = torch.compile(vae.decode_chunk, fullgraph=True, backend="eager")
    cache, reference = TemporalCache(), TemporalCache()
    for part in random_latents(vae, 1, 3, 2, 2).split(1, dim=2):
        assert torch.equal(decode(part, cache), vae.decode_chunk(part, reference))


def test_it_runs_on_meta_tensors():
    vae = tiny_vae("2.1").to("meta")
    accelerate(vae)
    assert vae.decode(random_latents(vae, 1, 2, 2, 2).to("meta")).sample.shape == (1, 3, 5, 16, 16)


@both_families
def test_it_takes_no_more_memory(family):
    vae = tiny_vae(family, torch.bfloat16)
    z = random_latents(vae, 1, 3, 16, 16)
    # Weights count as soon as a layer takes a part of them.
    weights = sum(parameter.nbytes for parameter in vae.decoder.parameters())
    peaks = []
    for attach in (detach, accelerate):
        attach(vae)
        with PeakMemory() as memory:
            vae.decode(z)
        peaks.append(memory.peak)
    assert peaks[1] <= peaks[0] + weights < 1.1 * peaks[0]


def test_other_models_are_refused():
    for function in (accelerate, detach):
        with pytest.raises(TypeError, match=r"vae is a Linear of torch; load it with wan22.AutoencoderKLWan"):
            function(nn.Linear(1, 1))


def _in_groups(vae):
    apply_group_offloading(vae, torch.device("cpu"), torch.device("cpu"), "leaf_level")


HOOKS = {
    "groups": _in_groups,
    "casts": lambda vae: apply_layerwise_casting(vae, torch.bfloat16, torch.float32, skip_modules_pattern=()),
    "pieces": lambda vae: hf_accelerate.cpu_offload(vae, "cpu"),
}


@pytest.mark.parametrize("name", HOOKS)
def test_layers_with_hooks_of_others_are_refused(name):
    vae = tiny_vae("2.1")
    HOOKS[name](vae)
    with pytest.raises(ValueError, match=r"vae\.\S+ has another's hook"):
        accelerate(vae)
    detach(vae)
    assert not any(isinstance(layer, SubpixelConv2d) for layer in vae.modules())
    vae = tiny_vae("2.1")
    accelerate(vae)
    HOOKS[name](vae)
    with pytest.raises(ValueError, match="has another's hook"):
        detach(vae)


@pytest.mark.parametrize("name", ["groups", "pieces"])
def test_hooks_that_came_later_keep_the_result(name):
    vae = tiny_vae("2.1")
    z = random_latents(vae, 1, 2, 2, 2)
    accelerate(vae)
    sample = vae.decode(z).sample
    HOOKS[name](vae)
    assert relative_error(vae.decode(z).sample, sample) <= 1e-5


@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_have_changed_since_count(assign):
    vae = tiny_vae("2.1")
    z = random_latents(vae, 1, 2, 2, 2)
    other = {key: value * 1.1 for key, value in vae.state_dict().items()}
    accelerate(vae)
    vae.load_state_dict(other, assign=assign)
    sample = vae.decode(z).sample
    accelerate(vae)
    assert relative_error(vae.decode(z).sample, sample) <= 1e-5
    detach(vae)
    assert relative_error(vae.decode(z).sample, sample) <= 1e-5


def test_sums_move_with_the_weights():
    vae = tiny_vae("2.1")
    accelerate(vae)
    z = random_latents(vae, 1, 2, 2, 2)
    sample = vae.decode(z).sample
    for parameter in vae.parameters():  # as offloads do
        parameter.data = parameter.data.clone()
    vae.double().float()
    assert torch.equal(vae.decode(z).sample, sample)


def test_layouts_are_for_where_it_runs_not_where_the_weights_are(monkeypatch):
    vae = tiny_vae("2.1", base_dim=64)
    monkeypatch.setattr(module, "get_module_execution_device", lambda vae: torch.device("cuda"))
    accelerate(vae)
    assert not any(w.is_contiguous() for w in vae.parameters() if w.ndim == 5 and w.shape[2:].numel() > 1)
    monkeypatch.undo()
    accelerate(vae)
    assert any(w.is_contiguous() for w in vae.parameters() if w.ndim == 5 and w.shape[2:].numel() > 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@both_families
def test_on_a_gpu(family, monkeypatch):
    """In float32 proper; TF32, PyTorch's default for convolutions, is off by more than the bound."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae = tiny_vae(family).cuda()
    x, z = random_video(vae, 1, 3, 3, 2).cuda(), random_latents(vae, 1, 3, 3, 2).cuda()
    plain = _results(vae, x, z)
    accelerate(vae)
    for fast, reference in zip(_results(vae, x, z), plain, strict=True):
        assert relative_error(fast.cpu(), reference.cpu()) <= 1e-5
    detach(vae)
    assert all(torch.equal(a, b) for a, b in zip(_results(vae, x, z), plain, strict=True))
