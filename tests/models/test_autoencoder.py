"""The autoencoder against the official numbers and diffusers, and in chunks, streams and threads."""

import copy
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch

from tests.models.vaes import (
    CONFIGS,
    FAMILIES,
    PeakMemory,
    golden_vae,
    random_latents,
    random_video,
    relative_error,
    tiny_vae,
)
from wan22 import AutoencoderKLWan
from wan22.models import autoencoder
from wan22.models.autoencoder import LATENTS_MEAN, LATENTS_STD, patchify, unpatchify
from wan22.models.autoencoder_layers import DuplicateUp
from wan22.models.temporal_cache import TemporalCache

both_families = pytest.mark.parametrize("family", FAMILIES)

# The configs of Wan-AI/Wan2.2-T2V-A14B-Diffusers and Wan-AI/Wan2.2-TI2V-5B-Diffusers, statistics shortened.
HUB_CONFIGS = {
    "2.1": {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": "0.35.0.dev0",
        "attn_scales": [],
        "base_dim": 96,
        "dim_mult": [1, 2, 4, 4],
        "dropout": 0.0,
        "latents_mean": list(LATENTS_MEAN),
        "latents_std": list(LATENTS_STD),
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "z_dim": 16,
    },
    "2.2": {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": "0.35.0.dev0",
        "attn_scales": [],
        "base_dim": 160,
        "clip_output": False,
        "decoder_base_dim": 256,
        "dim_mult": [1, 2, 4, 4],
        "dropout": 0.0,
        "in_channels": 12,
        "is_residual": True,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
        "num_res_blocks": 2,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "scale_factor_temporal": 4,
        "temperal_downsample": [False, True, True],
        "z_dim": 48,
    },
}


def _shapes(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


# Official numbers.


@pytest.mark.parametrize("name", ["vae21", "vae22"])
def test_golden(name):
    vae, cases = golden_vae(name)
    errors = {}
    for case, data in cases.items():
        if "video" in data:
            mean = vae.encode(data["video"]).latent_dist.mode()
            errors[case] = relative_error(mean, data["mean_raw"])
            normalised = vae.normalize_latents(mean)
            errors[f"{case} normalised"] = relative_error(normalised, data["mean_normalised"])
        else:
            z = vae.denormalize_latents(data["z"])
            errors[case] = relative_error(vae._decode_clip(z, 1), data["video_unclamped"])
            assert torch.equal(vae.decode(z).sample, vae._decode_clip(z, 1).clamp(-1, 1))
    assert len(errors) == 12
    assert max(errors.values()) <= 1e-6, errors


# Diffusers.


@both_families
def test_the_plain_model_returns_tensors(family):
    """The same numbers as the class for diffusers, whose state dict it loads."""
    vae = tiny_vae(family)
    plain = autoencoder.AutoencoderKLWan(**CONFIGS[family])
    plain.load_state_dict(vae.state_dict())
    x = random_video(vae, 1, 3, 2, 2)
    with torch.no_grad():
        moments = plain.encode(x)
        assert torch.equal(moments, vae.encode(x).latent_dist.parameters)
        pieces = x.split(4, dim=2)
        for own, posterior in zip(plain.encode_stream(pieces), vae.encode_stream(pieces), strict=True):
            assert torch.equal(own, posterior.parameters)
        assert torch.equal(plain(x), vae(x).sample)
        assert torch.equal(plain(x), plain.decode(moments.chunk(2, dim=1)[0]))


@both_families
def test_equals_diffusers(family):
    ours = tiny_vae(family)
    theirs = diffusers.AutoencoderKLWan(**CONFIGS[family]).eval()
    assert _shapes(ours) == _shapes(theirs)
    theirs.load_state_dict(ours.state_dict())
    x, z = random_video(ours, 2, 4, 2, 3), 3 * random_latents(ours, 2, 4, 2, 3)
    with torch.no_grad():
        moments, sample = theirs.encode(x).latent_dist.parameters, theirs.decode(z).sample
    assert relative_error(ours.encode(x).latent_dist.parameters, moments) <= 1e-6
    assert relative_error(ours.decode(z).sample, sample) <= 1e-6


@both_families
def test_hub_configs_build_the_shapes_of_diffusers(family):
    with torch.device("meta"):
        ours = AutoencoderKLWan.from_config(HUB_CONFIGS[family])
        theirs = diffusers.AutoencoderKLWan.from_config(HUB_CONFIGS[family])
    assert _shapes(ours) == _shapes(theirs)
    assert {key for key in ours.config if key[0] != "_"} == {key for key in theirs.config if key[0] != "_"}
    assert ours.spatial_stride == theirs.config.scale_factor_spatial
    assert ours.temporal_stride == theirs.config.scale_factor_temporal


def test_default_config_is_that_of_diffusers():
    with torch.device("meta"):
        ours, theirs = AutoencoderKLWan().config, diffusers.AutoencoderKLWan().config
    for key, value in theirs.items():
        assert key[0] == "_" or (list(ours[key]) if isinstance(value, list) else ours[key]) == value, key


@both_families
def test_saved_folders_load_in_either_library(family, tmp_path):
    ours = tiny_vae(family)
    z = random_latents(ours, 1, 2, 2, 2)
    sample = ours.decode(z).sample
    ours.save_pretrained(tmp_path / "ours")
    theirs = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "ours").eval()
    assert type(theirs) is diffusers.AutoencoderKLWan
    with torch.no_grad():
        assert relative_error(theirs.decode(z).sample, sample) <= 1e-6
    theirs.save_pretrained(tmp_path / "theirs")
    again = AutoencoderKLWan.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again.decode(z).sample, sample)


# Chunks and streams.


@both_families
def test_chunk_size_changes_nothing(family):
    vae = tiny_vae(family, torch.float64)
    x, z = random_video(vae, 1, 6, 2, 1), random_latents(vae, 1, 6, 2, 1)
    moments, sample = (
        vae.encode(x, chunk_latents=None).latent_dist.parameters,
        vae.decode(z, chunk_latents=None).sample,
    )
    for chunk in (1, 2, 3, 5, 6, 9):
        assert relative_error(vae.encode(x, chunk_latents=chunk).latent_dist.parameters, moments) <= 1e-13
        assert relative_error(vae.decode(z, chunk_latents=chunk).sample, sample) <= 1e-13


@both_families
def test_frames_depend_on_no_later_frame(family):
    vae = tiny_vae(family, torch.float64)
    x, z = random_video(vae, 1, 4, 1, 2), random_latents(vae, 1, 4, 1, 2)
    moments, sample = vae.encode(x).latent_dist.parameters, vae.decode(z).sample
    assert relative_error(vae.encode(x[:, :, :5]).latent_dist.parameters, moments[:, :, :2]) <= 1e-13
    assert relative_error(vae.decode(z[:, :, :2]).sample, sample[:, :, :5]) <= 1e-13


@pytest.mark.parametrize("memory", ["whole", "sliced", "tiled", "sliced and tiled"])
@pytest.mark.parametrize("chunk", [1, 2])
@both_families
def test_streams_equal_clips(family, chunk, memory):
    vae = tiny_vae(family)
    if "sliced" in memory:
        vae.enable_slicing()
    if "tiled" in memory:
        s = vae.spatial_stride
        vae.enable_tiling(2 * s, 2 * s, s, s)
    x, z = random_video(vae, 2, 3, 3, 2), random_latents(vae, 2, 3, 3, 2)
    pieces = list(vae.decode_stream(z, chunk))
    assert [piece.shape[2] for piece in pieces] == ([1, 4, 4] if chunk == 1 else [5, 4])
    assert torch.equal(torch.cat(pieces, dim=2), vae.decode(z, chunk_latents=chunk).sample)
    moments = vae.encode(x, chunk_latents=chunk).latent_dist.parameters
    for cut in ([9], [1, 4, 4], [3, 3, 3], [2, 7]):
        posteriors = list(vae.encode_stream(iter(x.split(cut, dim=2)), chunk))
        streamed = torch.cat([posterior.parameters for posterior in posteriors], dim=2)
        assert relative_error(streamed, moments) <= 1e-6


def test_a_stream_computes_only_what_is_taken():
    vae = tiny_vae("2.1")
    calls = []
    vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    stream = vae.decode_stream(random_latents(vae, 1, 5, 1, 1))
    assert not calls
    next(stream), next(stream)
    assert len(calls) == 2


@pytest.mark.parametrize("tiled", [False, True])
@both_families
def test_stream_memory_does_not_grow_with_the_video(family, tiled):
    vae = tiny_vae(family)
    if tiled:
        s = vae.spatial_stride
        vae.enable_tiling(2 * s, 2 * s, s, s)

    def peak(latent_frames, direction):
        z = random_latents(vae, 1, latent_frames, 3, 2)
        pieces = (random_video(vae, 1, 2, 3, 2)[:, :, -4 if i else -1 :] for i in range(latent_frames))
        with PeakMemory() as memory:
            for _ in vae.decode_stream(z) if direction == "decode" else vae.encode_stream(pieces):
                pass
        return memory.peak

    latents = random_latents(vae, 1, 8, 3, 2).nbytes
    for direction in ("decode", "encode"):
        # All latents, a fiftieth of the video, go through `post_quant_conv` at the start, tile by tile.
        assert peak(12, direction) - peak(4, direction) <= 3 * latents, direction
    if not tiled:
        z = random_latents(vae, 1, 12, 3, 2)
        with PeakMemory() as whole:
            vae.decode(z, chunk_latents=None)
        assert whole.peak > 2 * peak(12, "decode")


def test_whole_clip_is_differentiable():
    vae = tiny_vae("2.2", torch.float64).requires_grad_(True)
    x = random_video(vae, 1, 3, 1, 1)

    def gradients(chunk):
        vae.zero_grad()
        z = vae.encode(x, chunk_latents=chunk).latent_dist.mode()
        vae.decode(z, chunk_latents=chunk).sample.square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in vae.named_parameters()}

    whole, chunked = gradients(None), gradients(1)
    assert all(gradient.abs().sum() > 0 for name, gradient in whole.items() if "to_qkv.bias" not in name)
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-9, atol=1e-14)


# No state.

# Two resolutions, which have every kind of layer, keep compilation short.
SHALLOW = {"dim_mult": [2, 2], "temperal_downsample": [True], "scale_factor_temporal": 2}


@both_families
def test_fullgraph_compiles_first_and_later_chunks(family):
    vae = tiny_vae(family, **SHALLOW)
    torch._dynamo.reset()
    encode = torch.compile(vae.encode_chunk, fullgraph=True, backend="eager")
    decode = torch.compile(vae.decode_chunk, fullgraph=True, backend="eager")
    x, z = random_video(vae, 1, 4, 1, 1), random_latents(vae, 1, 4, 1, 1)
    assert torch.equal(encode(x), vae.encode_chunk(x))
    assert torch.equal(decode(z), vae.decode_chunk(z))
    for compiled, plain, parts in (
        (encode, vae.encode_chunk, x.split([1, 2, 2, 2], dim=2)),
        (decode, vae.decode_chunk, z.split(1, dim=2)),
    ):
        cache, reference = TemporalCache(), TemporalCache()
        for part in parts:
            assert torch.equal(compiled(part, cache), plain(part, reference))


def test_one_compilation_serves_all_later_chunks():
    vae = tiny_vae("2.1", **SHALLOW)
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    decode = torch.compile(vae.decode_chunk, fullgraph=True, backend=count, dynamic=False)
    cache = TemporalCache()
    for part in random_latents(vae, 1, 8, 1, 1).split(1, dim=2):
        decode(part, cache)
    # The first chunk, the second (the temporal upsamplers meet their first context), all others.
    assert len(graphs) == 3


@both_families
def test_threads_share_a_model(family):
    vae = tiny_vae(family)
    xs = [random_video(vae, 1, 3, 2, 2) * scale for scale in (1.0, 0.5, -1.0, 0.1)]
    zs = [random_latents(vae, 1, 3, 2, 2) * scale for scale in (1.0, 0.5, -1.0, 2.0)]

    def run(i):
        return vae.encode(xs[i]).latent_dist.parameters, vae.decode(zs[i]).sample

    expected = [run(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for result, reference in zip(pool.map(run, range(4)), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(result, reference, strict=True))


def test_running_changes_no_attribute():
    vae = tiny_vae("2.2")

    def state():
        return {name: {k: v for k, v in vars(m).items() if k[0] != "_"} for name, m in vae.named_modules()}

    before = copy.deepcopy(state())
    vae(random_video(vae, 1, 2, 1, 1))
    assert state() == before


# Numbers.


@both_families
def test_latents_are_normalised_in_float32(family):
    vae = tiny_vae(family, torch.bfloat16)
    z = random_latents(vae, 1, 2, 2, 2)
    normalised = vae.normalize_latents(z)
    assert normalised.dtype == torch.float32
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    torch.testing.assert_close(normalised, (z.float() - mean) / std)
    torch.testing.assert_close(vae.denormalize_latents(normalised), z.float())
    assert vae.normalize_latents(z.double()).dtype == torch.float64


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
@both_families
def test_half_types(family, dtype, bound):
    exact, half = tiny_vae(family, torch.float64), tiny_vae(family, dtype)
    x, z = random_video(half, 1, 3, 2, 2), random_latents(half, 1, 3, 2, 2)
    moments, sample = half.encode(x).latent_dist.parameters, half.decode(z).sample
    assert moments.dtype == sample.dtype == dtype
    assert relative_error(moments, exact.encode(x.double()).latent_dist.parameters) <= bound
    assert relative_error(sample, exact.decode(z.double()).sample) <= bound


def test_norms_of_large_float16_activations_stay_finite():
    norm = tiny_vae("2.1", torch.float16).encoder.norm_out
    x = torch.full((1, norm.gamma.shape[0], 1, 2, 2), 3e4, dtype=torch.float16)
    torch.testing.assert_close(norm(x), norm.gamma.expand_as(x[0])[None])


def test_patchify_orders_columns_before_rows():
    x = torch.arange(2 * 4 * 6).reshape(1, 2, 1, 4, 6)
    patches = patchify(x, 2)
    assert patches.shape == (1, 8, 1, 2, 3)
    # Channel (c, q, p) of cell (h, w) is pixel (2h + p, 2w + q).
    assert patches[0, 1 * 4 + 1 * 2 + 0, 0, 1, 2] == x[0, 1, 0, 2, 5]
    assert torch.equal(unpatchify(patches, 2), x)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs", "factor_t"), [(4, 4, 2), (4, 2, 2), (4, 1, 2), (4, 2, 1), (2, 4, 1)]
)
def test_shortcut_up_adds_repeated_channels(inputs, outputs, factor_t, started):
    torch.manual_seed(0)
    x = torch.randn(2, inputs, 3, 2, 3)
    cache = TemporalCache()
    cache.started = started
    repeats = outputs * factor_t * 4 // inputs
    shortcut = x.repeat_interleave(repeats, dim=1).unflatten(1, (outputs, factor_t, 2, 2))  # b c ft q p t h w
    shortcut = shortcut.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(2, outputs, 3 * factor_t, 4, 6)
    shortcut = shortcut if started else shortcut[:, :, factor_t - 1 :]
    y = torch.randn_like(shortcut)
    expected = y + shortcut
    assert torch.equal(DuplicateUp(inputs, outputs, factor_t, 2)(x, y, cache), expected)


def test_extra_encoder_attention_takes_part():
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1, attn_scales=[0.5]).eval().requires_grad_(False)
    theirs = diffusers.AutoencoderKLWan(base_dim=4, num_res_blocks=1, attn_scales=[0.5])
    assert _shapes(vae) == _shapes(theirs)
    x = random_video(vae, 1, 2, 2, 2)
    before = vae.encode(x).latent_dist.mode()
    vae.encoder.down_blocks[3].proj.bias += 1
    assert relative_error(vae.encode(x).latent_dist.mode(), before) > 0.01


# Errors.


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 6, 16, 16), "6 frames.*1 \\+ a multiple of 4.*5 or 9"),
        ((1, 3, 5, 20, 16), "height=20 .*multiple of 8.*16 and 24"),
        ((1, 3, 5, 16, 4), "width=4 .*multiple of 8.*8 and 16"),
        ((1, 4, 5, 16, 16), r"\(1, 4, 5, 16, 16\).*\(b, 3, t, h, w\)"),
        ((3, 5, 16, 16), r"\(3, 5, 16, 16\).*\(b, 3, t, h, w\)"),
        ((1, 3, 0, 16, 16), r"\(b, 3, t, h, w\)"),
    ],
)
def test_videos_that_cannot_be_encoded(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny_vae("2.1").encode(torch.zeros(shape))


def test_a_stream_of_the_wrong_length_is_refused_at_its_end():
    vae = tiny_vae("2.1")
    stream = vae.encode_stream(random_video(vae, 1, 2, 1, 1)[:, :, :3].split(1, dim=2))
    next(stream)
    with pytest.raises(ValueError, match=r"3 frames.*1 or 5"):
        next(stream)


@pytest.mark.parametrize("shape", [(1, 48, 2, 2, 2), (16, 2, 2, 2), (1, 16, 0, 2, 2)])
def test_latents_that_cannot_be_decoded(shape):
    vae = tiny_vae("2.1")
    for decode in (vae.decode, vae.decode_stream):
        with pytest.raises(ValueError, match=r"latents have shape .*\(b, 16, t, h, w\)"):
            decode(torch.zeros(shape))


def test_another_dtype_than_the_models():
    vae, x, z = tiny_vae("2.1").bfloat16(), torch.zeros(1, 3, 5, 16, 16), torch.zeros(1, 16, 2, 2, 2)
    for call, given, what in ((vae.encode, x, "video"), (vae.decode, z, "latents")):
        with pytest.raises(
            ValueError, match=rf"{what}: dtype is torch\.float32; .*{what}\.to\(torch\.bfloat16\)"
        ):
            call(given)
    with pytest.raises(ValueError, match=r"latents\.to\(torch\.bfloat16\)"):
        vae.decode_stream(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert vae.decode(z).sample.shape == (1, 3, 5, 16, 16)


def test_chunks_of_nothing_are_refused():
    vae = tiny_vae("2.1")
    with pytest.raises(ValueError, match=r"chunk_latents is 0.*at least 1"):
        vae.decode_stream(random_latents(vae, 1, 1, 1, 1), chunk_latents=0)
