"""The videos play in a browser: headless Chromium opens them and reads back duration, size and colours."""

import json
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tests.video.test_result import FPS, H, T, W, video
from tests.waiting import HANG

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

# Plays the page's video to its end, then goes to the middle of each frame and reads its pixels.
SCRIPT = """<script>
const told = {};
const send = () => fetch("/told", {method: "POST", body: JSON.stringify(told)});
const once = (what, name) => new Promise((yes, no) => {
  what.addEventListener(name, yes, {once: true});
  what.addEventListener("error", () => no(what.error && what.error.message), {once: true});
});
const shown = (video, t) => new Promise(yes => {
  const next = () => video.requestVideoFrameCallback(look);
  const look = (_, frame) => Math.round(frame.mediaTime * RATE) == t ? yes() : next();
  next();
});
(async () => {
  const video = document.querySelector("video");
  // As a whole: the server here cannot send a part, and without that a browser cannot seek.
  if (video.dataset.file) video.src = URL.createObjectURL(await (await fetch(video.dataset.file)).blob());
  video.loop = false; video.autoplay = false; video.pause();
  if (video.readyState < 2) await once(video, "loadeddata");
  Object.assign(told, {duration: video.duration, width: video.videoWidth, height: video.videoHeight});
  video.muted = true; video.currentTime = 0;
  const ended = once(video, "ended");
  await video.play(); await ended;
  told.played = video.currentTime;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [told.width, told.height];
  const brush = canvas.getContext("2d");
  told.frames = [];
  for (let t = 0; t < FRAMES; t++) {
    // "seeked" may come before the frame is shown; until then the canvas gets the frame before it.
    const presented = shown(video, t);
    video.currentTime = (t + 0.5) / RATE;
    await presented;
    brush.drawImage(video, 0, 0);
    told.frames.push(Array.from(brush.getImageData(0, 0, canvas.width, canvas.height).data));
  }
  send();
})().catch(error => { told.error = String(error); send(); });
</script>""".replace("FRAMES", str(T)).replace("RATE", str(FPS))


@pytest.fixture
def seen(tmp_path):
    """Return a function that opens a page in Chromium and returns what its script told."""
    answers, arrived = [], threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self):
            answers.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            arrived.set()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
    ]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]

    def look(html):
        (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8>{html}{SCRIPT}")
        address = f"http://127.0.0.1:{server.server_port}/page.html"
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        browser = subprocess.Popen(
            [CHROMIUM, *flags, profile, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            assert arrived.wait(HANG), "the page told nothing"
        finally:
            browser.kill()
            browser.wait()
        return answers[-1]

    yield look
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("where", ["file", "notebook"])
def test_a_video_plays(where, seen, tmp_path):
    if where == "file":
        video().save(tmp_path / "a clip 🐈.mp4")
        html = '<video data-file="a clip 🐈.mp4"></video>'
    else:
        html = video()._repr_html_()
    told = seen(html)
    assert "error" not in told, told["error"]
    assert (told["width"], told["height"]) == (W, H)
    assert told["duration"] == pytest.approx(T / FPS, abs=0.01)
    assert told["played"] == pytest.approx(T / FPS, abs=0.01)
    frames = np.array(told["frames"], dtype=int).reshape(T, H, W, 4)[..., :3]
    difference = np.abs(frames - video().as_uint8()[0])
    # Chromium turns YUV into RGB in its own way: its saturated blue is 9 lower than ffmpeg's. The next frame
    # would be off by 10 on average.
    assert difference.mean(axis=(1, 2, 3)).max() < 6, "each frame is the one that was written"
    assert difference[:, :4, :4].max() <= 12, "flat colours come back as they were"
