"""Every README: its Python runs, with the miniatures for the released checkpoints; its links exist."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_group

from tests.prompts.stubs import completion, serving
from tests.videos import frames_of
from wan22 import read_recipe, tiny_checkpoint
from wan22.cli.app import app
from wan22.video.writers import write_encoded

ROOT = Path(__file__).parents[1]
READMES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        *ROOT.glob("*.md"),
        *(p for d in ("wan22", "tests", "examples") for p in ROOT.glob(f"{d}/**/*.md")),
    ]
}
CODE = {
    name: blocks
    for name, text in READMES.items()
    if (blocks := re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
}
COMMANDS = [
    line
    for text in READMES.values()
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if re.match(r"wan22 |torchrun .* -m wan22.cli ", line)
]
COMMANDS += [
    line for text in READMES.values() for line in re.findall(r'^\|.*`(wan22 \w+ ".*?)`', text, re.MULTILINE)
]
LORAS = Path(__file__).parent / "loras"
LIGHTNING = "lightx2v/Wan2.2-Lightning/Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"
# What a machine without a GPU cannot do, or not in seconds. Longer texts are replaced first.
SMALLER = {
    "steps=2000": "steps=2, rank=2, dtype='fp32'",
    "pipe.enable_model_cpu_offload()": "",
    '.to("cuda")': '.to("cpu")',
    "width=832,": "width=64,",
    "height=480,": "height=64,",
    "num_frames=81,": "num_frames=17,",
    "num_inference_steps=40": "num_inference_steps=2",
    "seed=1": "seed=1, num_inference_steps=2",
    "num_frames=241": "num_frames=33, num_inference_steps=2",
    'output_type="latent")': 'output_type="latent", num_inference_steps=2)',
    "max_area=832 * 480": "max_area=64 * 64",
    "resolution=(832, 480)": "resolution=(64, 48)",
    "pipe.compile()": 'pipe.compile(backend="eager")',
    'memory="12GB"': 'memory="auto"',
    'pipe.fit("24GB", "64GB", height=480, width=832, num_frames=81)': (
        'pipe.fit(ram="64GB", height=64, width=64, num_frames=17)'
    ),
}
# The files that each README's lines leave behind.
MADE = {
    "README.md": ["cat.mp4", "jump.mp4"],
    "wan22/accel/README.md": [],
    "wan22/checkpoints/README.md": [],
    "wan22/pipelines/README.md": [
        "clips-1.mp4",
        "clips-2.mp4",
        "jump.mp4",
        "jump-5b.mp4",
        "kite.mp4",
        "long.mp4",
        "seeds.mp4",
    ],
    "wan22/prompts/README.md": ["fox.mp4"],
    "wan22/training/README.md": [],
}


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A working folder in which the names of the READMEs are folders and files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for task, name in (("t2v", "T2V-A14B"), ("i2v", "I2V-A14B"), ("ti2v", "TI2V-5B")):
        folder = tmp_path / "Wan-AI" / f"Wan2.2-{name}-Diffusers"
        folder.parent.mkdir(exist_ok=True)
        folder.symlink_to(tiny_checkpoint(task))
    Image.new("RGB", (96, 96), (200, 30, 30)).save("cat.jpg")
    Path("clips").mkdir()
    write_encoded(iter(frames_of(17)), Path("clips", "circle.mp4"), 8)
    Path("clips", "circle.txt").write_text("a red circle")
    Path(LIGHTNING).mkdir(parents=True)
    for expert in ("high", "low"):
        trained = LORAS / f"purple_{expert}.safetensors"
        shutil.copy(trained, f"motion_{expert}.safetensors")
        shutil.copy(trained, f"{LIGHTNING}/{expert}_noise_model.safetensors")
    shutil.copy(LORAS / "purple_high.safetensors", "style.safetensors")
    return tmp_path


def smaller(code):
    for there, here in sorted(SMALLER.items(), key=lambda pair: -len(pair[0])):
        code = code.replace(there, here)
    return code


@pytest.mark.parametrize("name", CODE)
def test_its_python_runs(name, released):
    names = {}
    with serving(completion("A red fox trots through a snowy wood.")) as (url, _):
        for code in CODE[name]:
            exec(smaller(code).replace("http://localhost:11434/v1", url), names)
    assert {path.name for path in released.glob("*.mp4")} == set(MADE[name])
    assert all((released / file).stat().st_size > 1000 for file in MADE[name])
    if "fox.mp4" in MADE[name]:
        assert read_recipe("fox.mp4").prompts == ("A red fox trots through a snowy wood.",)
    if "kite.mp4" in MADE[name]:
        assert Image.open("kite-sheet.png").size[0] > 64
        assert Image.open("now.png").size[0] >= 256


@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_are_understood(line):
    _, name, *arguments = shlex.split(line.partition("-m ")[2] if line.startswith("torchrun") else line)
    get_group(app).commands[name].make_context(name, arguments)


def test_every_replacement_is_of_use():
    code = "".join(code for blocks in CODE.values() for code in blocks)
    assert [there for there in SMALLER if there not in code] == []


def test_the_plan_is_the_one_that_the_notebook_prints():
    (plan,) = re.findall(
        r"^```\n(Wan2.2-T2V.*?)^```", READMES["wan22/accel/README.md"], re.MULTILINE | re.DOTALL
    )
    notebook = json.loads((ROOT / "examples/notebooks/faster_and_smaller.ipynb").read_text(encoding="utf-8"))
    printed = ["".join(o.get("text", "")) for cell in notebook["cells"] for o in cell.get("outputs", ())]
    assert plan in printed


def test_the_readme_is_short():
    assert len(READMES["README.md"].splitlines()) <= 200


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    """Files exist, and so do the headings that a link names."""
    for target in re.findall(r'(?:\]\(|src=")([^)\s"]+)[)"]', READMES[name]):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def anchors(text):
    """GitHub's names of a file's headings."""
    outside_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", outside_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
