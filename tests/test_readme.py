"""The README's Python lines run, on the miniatures in the place of the released checkpoints."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.prompts.stubs import completion, serving
from wan22 import WanT2VPipeline, read_recipe, tiny_checkpoint

README = Path(__file__).parents[1] / "README.md"
LORAS = Path(__file__).parent / "loras"
LIGHTNING = "lightx2v/Wan2.2-Lightning/Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
# What a machine without a GPU cannot do, or not in seconds; each of them is in the README.
SMALLER = {
    "pipe.enable_model_cpu_offload()": "",
    '.to("cuda")': '.to("cpu")',
    "width=832,": "width=64,",
    "height=480,": "height=64,",
    "num_frames=81,": "num_frames=17,",
    "num_inference_steps=40": "num_inference_steps=4",
    "num_frames=241": "num_frames=33",
    "max_area=832 * 480": "max_area=64 * 64",
    "pipe.compile()": 'pipe.compile(backend="eager")',
    'memory="12GB"': 'memory="auto"',
    'pipe.fit("24GB", "64GB", height=480, width=832, num_frames=81)': (
        'pipe.fit(ram="64GB", height=64, width=64, num_frames=17)'
    ),
}


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A folder in which the names of the README are folders and files."""
    monkeypatch.chdir(tmp_path)
    for task, name in (("t2v", "T2V-A14B"), ("i2v", "I2V-A14B"), ("ti2v", "TI2V-5B")):
        folder = tmp_path / "Wan-AI" / f"Wan2.2-{name}-Diffusers"
        folder.parent.mkdir(exist_ok=True)
        folder.symlink_to(tiny_checkpoint(task))
    (tmp_path / "Wan-AI" / "t2v").symlink_to(tiny_checkpoint("t2v"))  # which the others share components of
    Image.new("RGB", (96, 96), (200, 30, 30)).save("cat.jpg")
    Path(LIGHTNING).mkdir(parents=True)
    for expert in ("high", "low"):
        trained = LORAS / f"purple_{expert}.safetensors"
        shutil.copy(trained, f"motion_{expert}.safetensors")
        shutil.copy(trained, f"{LIGHTNING}/{expert}_noise_model.safetensors")
    shutil.copy(LORAS / "purple_high.safetensors", "style.safetensors")
    return tmp_path


def sections():
    """The README's sections that hold Python: (title, [code])."""
    for part in re.split(r"^## ", README.read_text(encoding="utf-8"), flags=re.MULTILINE):
        blocks = re.findall(r"^```python\n(.*?)^```", part, re.MULTILINE | re.DOTALL)
        if blocks:
            yield part.partition("\n")[0], blocks


def test_its_python_runs(released, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = dict(sections())
    assert len(found) >= 7
    changes = set(SMALLER)
    with serving(completion("A red fox trots through a snowy wood.")) as (url, _):
        names = {}
        for title, blocks in found.items():
            if title in ("LoRA", "Fast and small"):  # which are about a pipeline for text
                names["pipe"] = WanT2VPipeline.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
            if title.startswith("Models"):
                names["latents"] = torch.randn(1, 48, 2, 4, 4)
                names["pipe"] = WanT2VPipeline.from_pretrained(tiny_checkpoint())
            for code in blocks:
                for there, here in sorted(SMALLER.items(), key=lambda pair: -len(pair[0])):
                    if there in code:
                        changes.discard(there)
                        code = code.replace(there, here)
                exec(code.replace("http://localhost:11434/v1", url), names)
    assert not changes, "these are no longer in the README"
    made = [
        "cat.mp4",
        "clips-1.mp4",
        "clips-2.mp4",
        "kite.mp4",
        "long.mp4",
        "fox.mp4",
        "jump.mp4",
        "jump-5b.mp4",
    ]
    assert all((released / name).stat().st_size > 1000 for name in made)
    assert read_recipe("fox.mp4").prompts == ("A red fox trots through a snowy wood.",)
    assert Image.open("kite-sheet.png").size[0] > 64 and Image.open("now.png").size[0] >= 256
