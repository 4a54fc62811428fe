"""Previews: when they come, what they show, the files and the notebook, and what must not end a run."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.builders import random_vae
from tests.models.test_tiny_autoencoder import tiny_decoder
from wan22.models.latent_rgb import latent_rgb_of
from wan22.pipelines.call import preview as module
from wan22.pipelines.call.preview import Preview, Previewer

VAE = random_vae(0)
FPS = 16


def latents(t=3, h=4, w=6, b=1):
    return torch.randn(b, 16, t, h, w, generator=torch.Generator().manual_seed(0))


def shown(previewer, num_steps=1, z=None):
    for step in range(1, num_steps + 1):
        previewer.step(step, num_steps, "high noise", latents() if z is None else z)


def test_a_function_gets_each_preview():
    seen = []
    z = latents(b=2)
    shown(Previewer(seen.append, VAE, FPS, every=2), 3, z)
    assert [(p.step, p.num_steps, p.label, p.fps) for p in seen] == [
        (2, 3, "high noise", FPS / 4),
        (3, 3, "high noise", FPS / 4),
    ]
    assert seen[0].frames.dtype == np.uint8 and seen[0].frames.shape == (3, 4, 6, 3)
    assert np.array_equal(seen[0].frames, latent_rgb_of(VAE).frames(z[0]).numpy())
    with pytest.raises(AttributeError):
        seen[0].step = 5


@pytest.mark.parametrize("num_steps", [1, 2, 4, 9, 10, 14, 15, 20, 40, 50, 77, 100])
def test_about_ten_and_always_the_last(num_steps):
    due = [s for s in range(1, num_steps + 1) if Previewer(print, VAE, FPS).due(s, num_steps)]
    assert due[-1] == num_steps
    assert min(num_steps, 7) <= len(due) <= 15
    assert len(set(np.diff([0, *due[:-1]]))) <= 1  # evenly, but for the last


@pytest.mark.parametrize("every", [1, 3, 7, 100])
def test_every(every):
    previewer = Previewer(print, VAE, FPS, every=every)
    due = [step for step in range(1, 21) if previewer.due(step, 20)]
    assert due == sorted({*range(every, 21, every), 20})


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "2"])
def test_every_must_be_a_number_of_steps(every):
    with pytest.raises(ValueError, match=f"preview_every={every!r} must be an int, at least 1"):
        Previewer(print, VAE, FPS, every=every)


@pytest.mark.parametrize(("width", "enlarged"), [(6, 258), (80, 320), (256, 256), (300, 300)])
def test_the_image_is_the_middle_frame_enlarged(width, enlarged):
    frames = np.random.default_rng(0).integers(0, 256, (4, 3, width, 3), np.uint8)
    preview = Preview(1, 2, "", frames, 4)
    assert preview.image.size == (enlarged, 3 * enlarged // width)
    factor = enlarged // width
    assert np.array_equal(np.asarray(preview.image)[::factor, ::factor], frames[2])
    assert np.array_equal(np.asarray(preview.image)[factor - 1 :: factor, factor - 1 :: factor], frames[2])
    assert len(preview.images) == 4


def test_png_is_the_middle_frame(tmp_path):
    path, seen = tmp_path / "new folder" / "look.PNG", []
    z = latents()
    shown(Previewer(seen.append, VAE, FPS), z=z)
    shown(Previewer(str(path), VAE, FPS), z=z)
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(seen[0].image))
    assert [p.name for p in path.parent.iterdir()] == ["look.PNG"]


@pytest.mark.parametrize("ending", [".gif", ".webp"])
def test_gif_and_webp_are_the_video(tmp_path, ending):
    path, seen = tmp_path / f"look{ending}", []
    z = latents()
    shown(Previewer(seen.append, VAE, FPS), z=z)
    shown(Previewer(path, VAE, FPS), 2, z)
    with Image.open(path) as video:
        assert (video.n_frames, video.size, video.info["loop"]) == (3, (258, 172), 0)
        for i, expected in enumerate(seen[0].images):
            video.seek(i)
            found = np.asarray(video.convert("RGB"), float)
            assert np.abs(found - np.asarray(expected)).mean() < 20
            assert video.info["duration"] == 250  # 4 latent frames a second
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", [".png", ".gif", ".webp"])
def test_a_viewer_never_sees_half_a_file(tmp_path, monkeypatch, ending):
    """While Pillow writes, and if it fails, the old file is there whole."""
    path = tmp_path / f"look{ending}"
    path.write_bytes(b"old")
    save, during = Image.Image.save, []

    def failing(image, target, **options):
        save(image, target, **options)
        during.append((str(target) != str(path), path.read_bytes()))
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", failing)
    shown(Previewer(path, VAE, FPS))
    assert during == [(True, b"old")]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    monkeypatch.undo()
    shown(Previewer(path, VAE, FPS))
    assert path.read_bytes() != b"old"


def test_a_file_that_cannot_be_written_ends_the_previews_not_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    previewer = Previewer(tmp_path / "file" / "look.png", VAE, FPS)
    shown(previewer, 4)
    (warning,) = caplog.messages
    assert "look.png cannot be written" in warning and "the run goes on without previews" in warning
    assert not previewer.due(4, 4)


def test_what_a_function_raises_is_raised():
    def stop(preview):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shown(Previewer(stop, VAE, FPS))

    def broken(preview):
        raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        shown(Previewer(broken, VAE, FPS))


@pytest.mark.parametrize("name", ["look.mp4", "look", "look.jpg"])
def test_other_endings(name):
    with pytest.raises(ValueError, match=rf"{name} must end in .png, .gif, .webp, as look.png, look.gif"):
        Previewer(name, VAE, FPS)


@pytest.mark.parametrize("show", [False, None, 3])
def test_other_ways_to_show(show):
    with pytest.raises(ValueError, match=f"cannot be shown by {show!r}; it must be True, a function"):
        Previewer(show, VAE, FPS)


def test_outside_a_notebook_true_is_a_file_in_the_working_folder(tmp_path, monkeypatch):
    """The folder of the start, wherever the run goes meanwhile; IPython's terminal is no notebook."""
    monkeypatch.setitem(sys.modules, "IPython", fake_ipython([], kernel=False))
    monkeypatch.chdir(tmp_path)
    previewer = Previewer(True, VAE, FPS)
    monkeypatch.chdir("/")
    shown(previewer, 3)
    assert previewer.place == "preview.png"
    assert Image.open(tmp_path / "preview.png").size == (258, 172)


def fake_ipython(calls, kernel=True):
    class Handle:
        def update(self, image):
            calls.append(("update", image.size))

    def display(image, display_id=None):
        calls.append(("display", image.size, display_id))
        return Handle()

    package = ModuleType("IPython")
    package.get_ipython = lambda: SimpleNamespace(kernel=object()) if kernel else SimpleNamespace()
    package.display = ModuleType("IPython.display")
    package.display.display = display
    return package


def test_in_a_notebook_one_picture_changes_in_place(tmp_path, monkeypatch):
    calls = []
    package = fake_ipython(calls)
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", package.display)
    monkeypatch.chdir(tmp_path)
    shown(Previewer(True, VAE, FPS, every=1), 3)
    assert calls == [("display", (258, 172), True), ("update", (258, 172)), ("update", (258, 172))]
    assert not [*tmp_path.iterdir()]


def test_a_decoder_shows_pixels(monkeypatch):
    """At full frame rate; wide frames are averaged down by a whole factor."""
    decoder, seen, z = tiny_decoder(latent_channels=16, patch_size=1), [], latents()
    shown(Previewer(seen.append, VAE, FPS, decoder=decoder), z=z)
    with torch.no_grad():
        pixels = decoder(z[0])
    expected = (pixels.permute(1, 2, 3, 0) * 255).round().to(torch.uint8).numpy()
    assert seen[0].fps == FPS and seen[0].frames.shape == (9, 32, 48, 3)
    assert np.array_equal(seen[0].frames, expected)

    monkeypatch.setattr(module, "LARGEST", 24)
    shown(Previewer(seen.append, VAE, FPS, decoder=decoder), z=z)
    halved = expected.reshape(9, 16, 2, 24, 2, 3).mean((2, 4))
    assert seen[1].frames.shape == (9, 16, 24, 3)
    assert np.abs(seen[1].frames - halved).max() <= 1


def test_a_decoder_from_a_file(tmp_path):
    """It computes in float32 on the CPU, whatever it is stored in."""
    decoder, seen = tiny_decoder(latent_channels=16, patch_size=1), []
    save_file(decoder.half().state_dict(), tmp_path / "taew2_1.safetensors")
    for given in (tmp_path / "taew2_1.safetensors", decoder.float()):
        shown(Previewer(seen.append, VAE, FPS, decoder=given))
    assert np.array_equal(seen[0].frames, seen[1].frames)


def test_a_decoder_for_other_latents():
    with pytest.raises(ValueError, match="takes 5 latent channels, the VAE has 16; taew2_1 takes 16,"):
        Previewer(print, VAE, FPS, decoder=tiny_decoder())


def test_without_memory_for_the_decoder_cells_are_shown(caplog):
    decoder, seen = tiny_decoder(latent_channels=16), []

    def full(z):
        raise torch.OutOfMemoryError("CUDA out of memory")

    decoder.stream = full
    shown(Previewer(seen.append, VAE, FPS, every=1, decoder=decoder), 2)
    assert [preview.frames.shape for preview in seen] == [(3, 4, 6, 3)] * 2
    assert seen[0].fps == FPS / 4
    assert caplog.messages == ["there is no memory for the previews' decoder; they go on without it"]


def test_unknown_latents_are_refused_before_the_run():
    vae = SimpleNamespace(config=SimpleNamespace(z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4))
    with pytest.raises(ValueError, match="latents have 4 channels"):
        Previewer(print, vae, FPS)
