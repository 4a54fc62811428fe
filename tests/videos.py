"""Small video files whose frames are known."""

import subprocess

import imageio_ffmpeg
import numpy as np

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


def frames_of(count, width=64, height=48, seed=0):
    """Return frames "t h w 3", each of another brightness, with a pattern of their own."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 60, (height // 8, width // 8, 3)).repeat(8, 0).repeat(8, 1)
    steps = (np.arange(count) * 180 // max(count, 1))[:, None, None, None]
    return (base[None] + steps).astype(np.uint8)


def lossless(path, frames, fps=16, *options):
    """Write frames as they are: FFV1 in RGB."""
    height, width = frames.shape[1:3]
    command = [FFMPEG, "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", str(fps), "-i", "-", *options, "-c:v", "ffv1", "-pix_fmt", "bgr0", str(path)]
    subprocess.run(command, input=frames.tobytes(), check=True)
    return path


def ffmpeg(*arguments):
    subprocess.run([FFMPEG, "-y", "-v", "error", *map(str, arguments)], check=True)
