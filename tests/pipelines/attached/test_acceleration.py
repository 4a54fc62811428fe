"""What makes a pipeline faster or smaller, together and one line each."""

import copy
import json
import subprocess
import sys

import diffusers
import pytest
import torch

from tests.builders import latents_of, random_components, random_pipeline
from tests.golden_data import relative_error
from wan22 import WanT2VPipeline
from wan22.accel.quantize import quantize

MODELS = ("text_encoder", "transformer", "transformer_2", "vae")

FIFTY = """
import json
from pathlib import Path
from tests.builders import latents_of, random_pipeline
from wan22.accel.offload.offloader import free

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

pipe, seen = random_pipeline(), []
for i in range(60):
    latents_of(pipe, "a prompt " * (i % 7), output_type="np", num_inference_steps=2)
    seen.append(memory())
print(json.dumps(seen))
"""


def own_pipeline():
    return random_pipeline(**{name: copy.deepcopy(random_components()[name]) for name in MODELS})


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_fifty_generations_do_not_grow():
    """Less than 2 %, after the first few have loaded all code."""
    run = subprocess.run([sys.executable, "-c", FIFTY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert max(seen[50:]) < 1.02 * max(seen[:10])


def test_attention_backends():
    pipe = own_pipeline()
    plain = latents_of(pipe)
    assert pipe.set_attention_backend("math") == "math"
    assert {m.backend for m in pipe.transformer_2.modules() if hasattr(m, "backend")} == {"math"}
    assert relative_error(latents_of(pipe), plain) <= 2e-6
    assert pipe.set_attention_backend() == "native"
    assert torch.equal(latents_of(pipe), plain)
    with pytest.raises(ValueError, match="attention backend 'fast' cannot be used"):
        pipe.set_attention_backend("fast")
    pipe.set_attention_backend("math")
    pipe.transformer.reset_attention_backend()
    assert {m.backend for m in pipe.transformer.modules() if hasattr(m, "backend")} == {"native"}


def test_without_a_transformer_there_is_no_attention():
    pipe = own_pipeline()
    pipe.transformer = pipe.transformer_2 = None
    with pytest.raises(ValueError, match="neither transformer nor transformer_2 is loaded"):
        pipe.set_attention_backend()


def test_quantising_both_experts():
    pipe = own_pipeline()
    plain = latents_of(pipe)
    pipe.quantize("int8")
    error = relative_error(latents_of(pipe), plain)
    assert 0 < error < 0.05
    pipe.quantize("int8")  # what is quantised stays as it is
    assert relative_error(latents_of(pipe), plain) == error
    with pytest.raises(ValueError, match="method 'int9' must be fp8, fp8_dynamic, int8 or"):
        pipe.quantize("int9")
    with pytest.raises(
        ValueError, match=r"quantised already \(int8\), and fp8 would round it twice.*load it again"
    ):
        pipe.quantize("fp8")
    with pytest.raises(ValueError, match=r"quantised already \(int8\), and fp8 would round"):
        pipe.fit(ram="12GB", quantize="fp8")
    assert relative_error(latents_of(pipe), plain) == error


def test_what_changes_results_is_told_with_its_settings():
    pipe = own_pipeline()
    assert pipe.acceleration.changes() == {}
    quantize(pipe.transformer, "int8", block=16)
    pipe.transformer_2.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    pipe.transformer_2.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
    pipe.vae.enable_tiling(tile_sample_min_height=64, tile_sample_stride_height=32)
    pipe.transformer.set_token_chunks(2)
    found = pipe.acceleration.changes()
    assert found.pop("quantized") == {"transformer": {"int8, 3 groups": 18, "int8, 4 groups": 2}}
    assert found.pop("cast")["transformer_2"].keys() == {"float8_e4m3fn"}
    assert found == {
        "step_cache": {"FirstBlockCacheConfig": {"transformer_2": {"threshold": "0.2"}}},
        "tiled": {"min_height": 64, "min_width": 256, "stride_height": 32, "stride_width": 192},
        "token_parts": 2,
    }


@pytest.mark.parametrize("memory", [None, "auto"])
def test_quantised_as_it_is_loaded(memory, tmp_path):
    random_pipeline().save_pretrained(tmp_path)
    expected = own_pipeline()
    expected.quantize("int8")
    pipe = WanT2VPipeline.from_pretrained(tmp_path, quantize="int8", memory=memory)
    pipe.set_progress_bar_config(disable=True)
    assert relative_error(latents_of(pipe), latents_of(expected)) <= 1e-6


def out_of_memory_below(vae, strips, monkeypatch):
    """Let decoding run out of memory after its first chunk, unless it is done in so many strips."""
    stream, tries = vae.decode_stream, []

    def limited(z, **options):
        if z.is_meta:  # the plan that the error's message tells of
            raise RuntimeError("this copy decodes nothing")
        tries.append(vae.num_strips if vae.use_strips else 1)
        for i, chunk in enumerate(stream(z, **options)):
            if i and tries[-1] < strips:
                raise torch.OutOfMemoryError("out of memory")
            yield chunk

    monkeypatch.setattr(vae, "decode_stream", limited)
    return tries


def test_decoding_goes_on_in_strips_when_memory_runs_out(monkeypatch, caplog):
    pipe = own_pipeline()
    arguments = {"output_type": "pt", "height": 64, "width": 64, "num_frames": 9}
    plain = latents_of(pipe, **arguments)
    tries = out_of_memory_below(pipe.vae, 4, monkeypatch)
    torch.testing.assert_close(latents_of(pipe, **arguments), plain, rtol=0, atol=1e-5)
    assert tries == [1, 2, 4]
    assert "memory ran out while decoding; from now on it is done in 4 strips" in caplog.text
    latents_of(pipe, **arguments)
    assert tries == [1, 2, 4, 4]


def test_decoding_that_fits_in_no_strips(monkeypatch):
    pipe = own_pipeline()
    tries = out_of_memory_below(pipe.vae, 99, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        latents_of(pipe, output_type="pt", num_frames=9)
    assert tries == [1, 2, 4, 8, 16]


def test_tiles_that_were_asked_for_stay(monkeypatch):
    pipe = own_pipeline()
    pipe.vae.enable_tiling(tile_sample_min_height=64, tile_sample_stride_height=32)
    tries = out_of_memory_below(pipe.vae, 2, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        latents_of(pipe, output_type="pt", num_frames=9)
    assert tries == [1]
