"""A page in the browser, on this machine alone, where prompts and images become videos.

`pip install "wan22-pipelines[app]"`, then `python examples/app.py`. Without arguments it runs the miniature
checkpoints, which know coloured shapes. Only the pipeline of the latest video stays loaded.
"""

import argparse
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import gradio as gr
import torch
from PIL import Image

import wan22

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--text", default=wan22.tiny_checkpoint("t2v"), help="checkpoint for text to video")
parser.add_argument("--image", default=wan22.tiny_checkpoint("i2v"), help="checkpoint for image to video")
parser.add_argument("--memory", default="auto", help='"auto", or GPU memory such as "12GB"')
parser.add_argument("--output", type=Path, default=Path("outputs/app"), help="folder of the gallery")
args = parser.parse_args()

SIZES = ["the model's own", "832 × 480", "480 × 832", "1280 × 720", "720 × 1280"]
EXACT, FAST, DISTILLED = "exact", "fast: half of the steps", "4 steps, with distilled LoRAs"
UNCHANGED = [gr.skip()] * 3
loaded: dict[str, Any] = {}  # one pipeline, by its class


def load(name: str, loras: list[str] | None, strength: float) -> Any:
    """Return the pipeline of a class, with these LoRAs and no others."""
    if name not in loaded:
        loaded.clear()  # first, so that there is room
        # bf16 is quick on a GPU, float32 on most CPUs.
        dtype: Any = {"default": "bfloat16", "vae": "float32"} if torch.cuda.is_available() else "float32"
        source = args.text if name == "WanT2VPipeline" else args.image
        loaded[name] = getattr(wan22, name).from_pretrained(source, dtype=dtype, memory=args.memory)
        loaded[name].accelerate()
    loaded[name].unload_lora_weights()
    for file in loras or ():
        expert = re.search("high|low", Path(file).name.lower())
        slot = expert[0] if expert else "pretrained_model_name_or_path_or_dict"
        loaded[name].load_lora_weights(**{slot: file}, strength=strength)
    return loaded[name]


def clips() -> list[Path]:
    """Return the gallery's videos, the newest first."""
    return sorted(args.output.glob("[0-9][0-9][0-9][0-9].mp4"), reverse=True)


def shown(clip: Path | None) -> list[Any]:
    """Return what the page shows of a video: preview, player, progress, gallery, recipe, its file."""
    recipe = wan22.read_recipe(clip) if clip else None
    settings = f"{recipe.prompts[0]}\n{recipe}" if recipe else ""
    gallery = [(str(file.with_suffix(".png")), file.stem) for file in clips()]
    return [gr.Image(visible=False), gr.Video(clip, visible=True), "", gallery, settings, clip]


def make(
    again: Path | None, image: str | None, prompt: str, loras: Any, strength: float, *fields: Any
) -> Iterator[list[Any]]:
    """Make a video as the fields say, or one again, in a thread; yield what `shown` does, with previews."""
    previews: SimpleQueue[Any] = SimpleQueue()

    def work() -> Path:
        recipe = wan22.read_recipe(again) if again else None
        first = again.with_suffix(".image") if again else Path(image or "")
        name = recipe.pipeline if recipe else "WanI2VPipeline" if image else "WanT2VPipeline"
        pipe = load(name, None if recipe and not recipe.loras else loras, strength)
        options: dict[str, Any] = {"preview": previews.put, "preview_every": 1}
        if first.is_file():
            options["image"] = str(first)
        if again:
            video = pipe.reproduce(again, **options)
        else:
            seed, size, speed = fields
            if seed is not None:
                options["seed"] = int(seed)
            if size != SIZES[0]:
                options["width"], options["height"] = map(int, size.split("×"))
            if speed == FAST:
                options["num_inference_steps"] = max(1, pipe.preset.num_inference_steps // 2)
            video = pipe(prompt=prompt, distilled="lightning-4" if speed == DISTILLED else None, **options)
        path = args.output / f"{max((int(clip.stem) for clip in clips()), default=0) + 1:04}.mp4"
        video.save(path)
        Image.fromarray(video.as_uint8()[0][-1]).save(path.with_suffix(".png"))
        if first.is_file():  # for making it again
            shutil.copy(first, path.with_suffix(".image"))
        return path

    yield [gr.Image(None, visible=True), gr.Video(visible=False), "loading", *UNCHANGED]
    with ThreadPoolExecutor(1) as pool:
        future, start = pool.submit(work), time.monotonic()
        future.add_done_callback(lambda _: previews.put(None))
        for now in iter(previews.get, None):
            left = (time.monotonic() - start) / now.step * (now.num_steps - now.step)
            told = f"step {now.step} of {now.num_steps}, about {left:.0f} s left"
            yield [now.image, gr.skip(), told, *UNCHANGED]
    failed = [gr.Image(visible=False), gr.Video(visible=True), f"no video: {future.exception()}", *UNCHANGED]
    yield failed if future.exception() else shown(future.result())


def choose(event: gr.SelectData) -> list[Any]:
    """Show a video of the gallery."""
    return shown(clips()[event.index])


with gr.Blocks(title="wan22", analytics_enabled=False) as page:
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(
                "a red circle moves to the right on a blue background", label="Prompt", lines=3
            )
            image = gr.Image(label="First frame, if any", type="filepath", sources=["upload"], height=200)
            with gr.Row():
                seed = gr.Number(None, label="Seed (empty: any)", precision=0, min_width=180)
                size = gr.Dropdown(SIZES, label="Size", min_width=180)
            speed = gr.Radio([EXACT, FAST, DISTILLED], value=EXACT, label="Speed")
            with gr.Accordion("LoRAs", open=False):
                files = gr.File(
                    label="high or low in a name: for that expert", file_count="multiple", height=120
                )
                strength = gr.Slider(0, 2, 1, label="Strength")
            with gr.Row():
                start = gr.Button("Make the video", variant="primary", min_width=180)
                stop = gr.Button("Stop", min_width=180)
        with gr.Column():
            preview = gr.Image(label="Preview", visible=False, interactive=False, buttons=[])
            video = gr.Video(label="Video", autoplay=True, loop=True, interactive=False)
            progress = gr.Textbox(label="Progress", interactive=False)
            recipe = gr.Textbox(label="Recipe", lines=3, max_lines=8, interactive=False)
            again, clip = gr.Button("Make it again"), gr.State()
    gallery = gr.Gallery(label="Gallery", columns=6, fit_columns=False, height=260, allow_preview=False)
    outputs: list[Any] = [preview, video, progress, gallery, recipe, clip]
    fields = [image, prompt, files, strength, seed, size, speed]
    start.click(make, [gr.State(), *fields], outputs, concurrency_id="make", show_progress="hidden")
    again.click(make, [clip, *fields], outputs, concurrency_id="make", show_progress="hidden")
    stop.click(lambda: next((pipe.stop() for pipe in loaded.values()), None))
    gallery.select(choose, None, outputs)
    page.load(lambda: shown(next(iter(clips()), None)), None, outputs)

theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
page.launch(server_name="127.0.0.1", theme=theme, allowed_paths=[str(args.output)], footer_links=[])
