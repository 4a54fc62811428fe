"""Pictures of strangers: what is opened, and how much is decoded."""

import io
import os
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.test_web import site
from wan22 import pictures
from wan22.pictures import read_picture


def in_format(form="PNG", size=(40, 24), mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, form, **options)
    return file.getvalue()


def refused(source, *parts, **options):
    with pytest.raises(ValueError, match="image") as caught:
        read_picture("image", source, **options)
    message = str(caught.value)
    assert [part for part in parts if str(part) not in message] == [] and "\n" not in message
    return message


# ---- files ----


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_usual_formats_are_read(form, tmp_path):
    (tmp_path / "a").write_bytes(in_format(form))
    assert read_picture("image", tmp_path / "a").size == (40, 24)


@pytest.mark.parametrize("form", ["EPS", "PPM", "PDF", "ICO"])
def test_others_are_refused_by_their_first_bytes(form, tmp_path):
    """Pillow runs Ghostscript for EPS."""
    (tmp_path / "a.png").write_bytes(in_format(form))
    refused(tmp_path / "a.png", "a.png", "is not an image that is read: PNG, JPEG")


def test_what_is_no_regular_file_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for source, why in (
        (tmp_path / "pipe", "no regular file"),
        (tmp_path / "zero", "no regular file"),
        ("file:///dev/zero", "no regular file"),
        (tmp_path, "a folder"),
        (tmp_path / "loop", ""),
        ("a\0b", "a\\x00b"),
        ("~nobody_here/a.png", "nobody_here"),
        ("file://elsewhere/a.png", "another machine"),
    ):
        refused(source, why)


def test_a_very_large_file_is_refused_unread(tmp_path):
    (tmp_path / "a.png").touch()
    os.truncate(tmp_path / "a.png", 10**11)
    refused(tmp_path / "a.png", "100000000000 bytes, a picture at most 200000000")


# ---- decoding ----


def png_header(width, height):
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + body
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_too_many_pixels_are_refused_by_the_header(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png_header(15_001, 10_000) + b"\0\0\0\0IDAT\x35\xaf\x06\x1e")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    refused(tmp_path / "a.png", "15001x10000 pixels, more than 150 million; make it smaller")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1", "L", "LA", "I;16", "CMYK"])
def test_a_large_image_is_made_smaller_by_a_whole_number(mode, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_KEPT", 1000)
    image = Image.new(mode, (120, 60))
    image.getexif()[0x0112] = 6
    assert pictures.upright_rgb(image).size == (20, 40)
    small = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    assert (np.asarray(pictures.upright_rgb(small)) == np.asarray(small)).all(), "others stay as they are"


def test_a_large_jpeg_is_decoded_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_KEPT", 20_000)
    monkeypatch.setattr(pictures, "MOST_PIXELS", 30_000)
    (tmp_path / "a.jpg").write_bytes(in_format("JPEG", (320, 240)))
    assert read_picture("image", tmp_path / "a.jpg").size == (160, 120)
    (tmp_path / "a.png").write_bytes(in_format("PNG", (320, 240)))
    refused(tmp_path / "a.png", "320x240 pixels")


def test_a_jpeg_of_very_many_scans_is_refused(tmp_path):
    data = in_format("JPEG", progressive=True)
    (tmp_path / "a.jpg").write_bytes(data)
    read_picture("image", tmp_path / "a.jpg")
    start = data.index(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(data[:start] + data[start:-2] * 100 + data[-2:])
    refused(tmp_path / "a.jpg", "scans, a JPEG at most 200")


# ---- servers ----


def test_pages_that_are_no_images_are_refused():
    kinds = {"image/png": True, "application/octet-stream": True, "text/html; charset=utf-8": False}
    pages = {f"/{i}": (200, {"Content-Type": k}, in_format()) for i, k in enumerate(kinds)}
    pages["/large"] = (200, {"Content-Length": str(10**9)}, b"")
    pages["/away"] = (302, {"Location": "file:///etc/passwd"}, b"")
    with site(pages) as (url, _):
        for i, accepted in enumerate(kinds.values()):
            if accepted:
                assert read_picture("image", f"{url}/{i}").size == (40, 24)
            else:
                refused(f"{url}/{i}", f"{url}/{i} cannot be fetched: it is not an image", "text/html")
        refused(f"{url}/large", "1000000000 bytes")
        refused(f"{url}/away", "redirected to 'file:///etc/passwd'")


def test_a_server_that_drips_is_given_up():
    def dripping(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    start = time.monotonic()
    with site({"/a.png": dripping}) as (url, _):
        refused(f"{url}/a.png", "timed out", timeout=0.1)
    assert time.monotonic() - start < 4


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_heic_names_the_extra(tmp_path, monkeypatch):
    """Or the image is read, by pillow-heif."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    (tmp_path / "a.heic").write_bytes(HEIC)
    said = r'a\.heic is HEIC; to read it: pip install "wan22-pipelines\[heic\]"'
    with pytest.raises(ValueError, match=said):
        read_picture("image", tmp_path / "a.heic")


def test_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    colours = Image.new("RGB", (64, 48), (200, 30, 60))
    pillow_heif.from_pillow(colours).save(tmp_path / "a.heic", quality=90)
    image = read_picture("image", tmp_path / "a.heic")
    assert image.size == (64, 48) and image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - np.asarray(colours)).max() < 12


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L"])
def test_made_smaller_in_strips_it_is_as_in_one(mode, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_KEPT", 3000)
    monkeypatch.setattr(pictures, "_ROWS", 7)
    pixels = np.random.default_rng(0).integers(0, 256, (101, 150, 4), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    plain = image.convert("RGBA" if image.has_transparency_data else "RGB").reduce(3)
    if plain.mode == "RGBA":
        plain = Image.alpha_composite(Image.new("RGBA", plain.size, "white"), plain)
    assert (np.asarray(pictures.upright_rgb(image)) == np.asarray(plain.convert("RGB"))).all()


def test_a_png_of_144_megapixels_takes_little_memory(tmp_path):
    """Decoded, it has 0.58 GB; nothing else of that size is made, and nothing of Pillow's is said."""
    Image.new("RGB", (12_000, 12_000), (200, 30, 60)).save(tmp_path / "a.png", compress_level=1)
    code = "import resource, sys; from wan22.pictures import read_picture; import PIL.Image, numpy\n"
    code += "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
    code += "before = peak(); image = read_picture('image', sys.argv[1]); print(*image.size, peak() - before)"
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    ran = subprocess.run(command, capture_output=True, text=True)
    width, height, taken = map(int, ran.stdout.split())
    assert (width, height) == (4000, 4000) and ran.stderr == ""
    assert taken < 1e9
