"""A user's script type-checks against the package, and mypy finds a wrong argument in it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# As for an installed package: its own lines are not checked again.
CONFIG = f"""
[mypy]
mypy_path = {ROOT}
[mypy-wan22.*,diffusers.*]
follow_imports = silent
"""
GOOD = """
import torch
import wan22
from wan22 import AutoencoderKLWan, FlowMatchEulerScheduler, WanI2VPipeline, WanT2VPipeline
from wan22 import WanTransformer3DModel, WanVideo, presets, read_recipe, tiny_checkpoint
from wan22.video.result import WanStream
from wan22.prompts import OpenAIChat, TextPrompt, extend_prompt

dtype = {"default": torch.bfloat16, "vae": torch.float32}
pipe = WanT2VPipeline.from_pretrained("Wan-AI/Wan2.2-T2V-A14B-Diffusers", dtype=dtype, memory="auto")
pipe.load_lora_weights("style.safetensors", adapter_name="style", strength=0.8)
pipe.set_adapters(["style"], [0.5])
pipe.accelerate()
pipe.compile()
pipe.set_attention_backend("auto")
pipe.quantize("fp8")
print(pipe.fit("24GB", "64GB", height=480, width=832, num_frames=81))
video = pipe(extend_prompt(TextPrompt("a red fox"), OpenAIChat("http://localhost/v1", "qwen3")), seed=1)
(path,) = video.save("fox.mp4", overwrite=True, quality=95)
print(path.name, video.fps, video.recipe.seeds[0], read_recipe(path).width)
video.contact_sheet().save("fox.png")
again: WanVideo = pipe.reproduce(path)
pipe.stream("a red kite", num_frames=241).save("long.mp4")
pipe.scheduler = FlowMatchEulerScheduler.from_config(pipe.scheduler.config)

files = WanT2VPipeline.from_single_file("high.gguf", "low.gguf", vae="vae.pth", memory="12GB")
files("a red kite", num_frames=presets.T2V_A14B.num_frames, negative_prompt="blurry").save("kite.mp4")
i2v = WanI2VPipeline.from_pretrained(tiny_checkpoint("i2v")).to("cuda")
i2v("cat.jpg", "The cat jumps", max_area=832 * 480, last_image="last.png", fit="pad").save("jump.mp4")
transformer = WanTransformer3DModel.from_single_file("high.gguf", dtype=torch.bfloat16)
vae = AutoencoderKLWan.from_pretrained("Wan-AI/Wan2.2-TI2V-5B-Diffusers", subfolder="vae")
stream: WanStream = pipe.stream("a red kite", num_frames=5)
print(len(stream), wan22.presets.T2V_A14B.fps, wan22.accel.plan(pipe), WanI2VPipeline.from_pipe(pipe).fit())
for frames in vae.decode_stream(torch.zeros(1, 48, 2, 4, 4)):
    print(frames.shape)
"""
WRONG = {
    'pipe("a fox", num_frame=17)': "num_frame",
    'pipe("a fox", num_frames="81")': "num_frames",
    'pipe("a fox").safe("fox.mp4")': "safe",
    'pipe.stream("a fox", num_frame=17)': "num_frame",
    'i2v.stream("cat.jpg", "a fox", last_imag="b.png")': "last_imag",
    'pipe.stream("a fox").safe("fox.mp4")': "safe",
    'WanI2VPipeline.from_pipe(pipe)("cat.jpg", prompts="a fox")': "prompts",
    'pipe.fit(vram=["12GB"])': "vram",
    'WanT2VPipeline.from_pretrained("folder", memory=[12])': "memory",
    "tiny_checkpoint(name=2)": "name",
}


@pytest.mark.slow
def test_a_users_script(tmp_path):
    (tmp_path / "mypy.ini").write_text(CONFIG)
    (tmp_path / "script.py").write_text(GOOD + "\n".join(WRONG))
    command = [sys.executable, "-m", "mypy", "--config-file=mypy.ini", "--cache-dir=cache", "script.py"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    errors = [line for line in output.splitlines() if ": error:" in line]
    first = len(GOOD.splitlines()) + 1
    assert [line.split(":")[:2] for line in errors] == [
        ["script.py", str(first + i)] for i in range(len(WRONG))
    ]
    for error, named in zip(errors, WRONG.values(), strict=True):
        assert named in error


def test_types_are_shipped():
    assert (ROOT / "wan22" / "py.typed").is_file()
