"""The page in a browser: a video is made, plays, is downloaded, made again and stopped, without a network."""

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.accel.parallel.ranks import environment
from tests.waiting import HANG
from wan22 import read_recipe

pytest.importorskip("gradio", reason="needs gradio, of the extra app")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

APP = Path(__file__).parents[2] / "examples" / "app.py"
PURPLE = Path(__file__).parents[1] / "loras"
PLAYED = """async video => {
  await video.play();
  await new Promise(later => setTimeout(later, 600));
  return video.currentTime;
}"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page's address, and the folder of its gallery."""
    folder = tmp_path_factory.mktemp("gallery")
    log = []
    address, found = [], threading.Event()
    server = subprocess.Popen(
        [sys.executable, "-u", APP, "--output", folder],
        env=environment() | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def read():
        for line in server.stdout:
            log.append(line)
            if match := re.search(r"http://\S+", line):
                address.append(match[0])
                found.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        assert found.wait(HANG), "".join(log)
        yield address[0], folder
    finally:
        server.terminate()
        server.wait(HANG)


@pytest.fixture
def page(served):
    """The page in a browser. All that it asks for comes from this machine."""
    asked = []
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(HANG * 1000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served[0])
        page.get_by_role("button", name="Make the video").wait_for()
        yield page
        browser.close()
    foreign = [url for url in asked if not url.startswith((served[0], "data:", "blob:"))]
    assert asked and not foreign


def wait_for(page, label, text):
    field = page.get_by_label(label, exact=True)
    playwright.expect(field).to_have_value(re.compile(text), timeout=HANG * 1000)


def make(page, button="Make the video", until=" 1 x 64x64"):
    """Press a button, see steps go by, and wait for a recipe."""
    page.get_by_role("button", name=button).click()
    wait_for(page, "Progress", r"step \d+ of \d+, about \d+ s left")
    wait_for(page, "Progress", "^$")
    wait_for(page, "Recipe", until)


def frames(clip):
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(clip))
    next(reader)
    return np.stack([np.frombuffer(frame, np.uint8) for frame in reader])


def test_a_video_is_made_plays_is_downloaded_and_made_again(page, served, tmp_path):
    address, folder = served
    assert address.startswith("http://127.0.0.1:")
    page.get_by_label("Seed").fill("4")
    page.get_by_text("fast: half of the steps").click()
    make(page)
    recipe = read_recipe(folder / "0001.mp4")
    assert (recipe.seeds, recipe.num_inference_steps) == ((4,), 10)
    assert recipe.prompts == ("a red circle moves to the right on a blue background",)

    assert page.locator("video").evaluate(PLAYED) > 0.2
    with page.expect_download() as download:
        page.get_by_label("Download").first.click()
    download.value.save_as(tmp_path / "mine.mp4")
    assert read_recipe(tmp_path / "mine.mp4").call == recipe.call

    page.get_by_label("Seed").fill("5")  # has no effect: it is made again from its recipe
    make(page, "Make it again")
    assert read_recipe(folder / "0002.mp4").call == recipe.call
    np.testing.assert_array_equal(frames(folder / "0002.mp4"), frames(folder / "0001.mp4"))


def test_an_image_starts_a_video_that_is_made_again(page, served, tmp_path):
    Image.new("RGB", (96, 96), (200, 30, 30)).save(tmp_path / "red.png")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "red.png")
    page.get_by_label("Prompt").fill("a red circle grows")
    page.get_by_text("4 steps, with distilled LoRAs").click()
    page.locator("img[src*=red]").first.wait_for()
    make(page, until="tiny-i2v")
    newest = max(served[1].glob("*.mp4"))
    assert read_recipe(newest).distilled == "lightning-4"
    assert frames(newest)[0].reshape(-1, 3).mean(0)[0] > 120, "it begins with the image"
    make(page, "Make it again", until="tiny-i2v")
    np.testing.assert_array_equal(frames(max(served[1].glob("*.mp4"))), frames(newest))


def test_two_loras_with_an_expert_in_their_names_are_a_pair(page, served):
    page.get_by_role("button", name="LoRAs").click()
    pair = [PURPLE / f"purple_{expert}.safetensors" for expert in ("high", "low")]
    page.locator("input[type=file]").last.set_input_files(pair)
    page.get_by_text("purple_low").first.wait_for()
    page.get_by_text("4 steps, with distilled LoRAs").click()
    make(page)
    (lora,) = read_recipe(max(served[1].glob("*.mp4"))).loras
    assert set(lora.strengths) == {"transformer", "transformer_2"}
    assert len(set(lora.files.values())) == 2, "each expert has its own file"


def test_a_run_is_stopped_and_the_gallery_shows_what_there_is(page, served):
    before = len(list(served[1].glob("*.mp4")))
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Make the video").click()
    wait_for(page, "Progress", r"step \d+ of 20")
    page.get_by_role("button", name="Stop").click()
    wait_for(page, "Progress", "^$")
    assert read_recipe(max(served[1].glob("*.mp4"))).steps_done < 20
    pictures = page.locator(".gallery-item img")
    playwright.expect(pictures).to_have_count(before + 1)


def test_what_cannot_be_made_is_said_and_the_page_goes_on(page, served):
    page.get_by_label("Prompt").fill("")
    page.get_by_label("Seed").fill("-1")
    page.get_by_role("button", name="Make the video").click()
    wait_for(page, "Progress", "no video: .*seed")
