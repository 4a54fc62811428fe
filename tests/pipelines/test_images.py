"""Images of every form become the right pixels, at the right size."""

import gc
import io
import json
import random
import struct
import threading
import warnings
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.golden_data import FOLDER, golden
from wan22.pipelines import images

W, H = 40, 24
BYTES = np.random.default_rng(0).integers(0, 256, (H, W, 4), np.uint8)
RGB = BYTES[..., :3]
UNIT = RGB / 255
CHW = torch.from_numpy(RGB.copy()).permute(2, 0, 1)
PICTURE = images.Picture(CHW / 127.5 - 1)
AREA = 704 * 1280
SIZES = json.loads((FOLDER / "size_rules.json").read_text())


def read(image):
    (picture,) = images.load_pictures("image", image)
    assert picture.pixels.dtype == torch.float32 and picture.pixels.shape[0] == 3
    return picture


def in_bytes(picture):
    return np.asarray(picture.to_pil()).astype(int)


def plain(mode, colour, **info):
    image = Image.new(mode, (W, H), colour)
    if mode in ("P", "PA"):
        image.putpalette([0, 0, 0, 200, 100, 40])
    image.info.update(info)
    return image


def save(path, image=None, **options):
    (image or Image.fromarray(RGB)).save(path, **options)
    return path


def refused(image, *parts, error=ValueError):
    with pytest.raises(error) as caught:
        images.load_pictures("image", image)
    assert str(caught.value).startswith("image")
    for part in parts:
        assert str(part) in str(caught.value)


# ---- reading ----


# A quarter of (200, 100, 40) on white is (241, 216, 201); a half of black is 127, a half of 50 is 152.
MODES = [
    (plain("1", 1), (255, 255, 255)),
    (plain("1", 1, transparency=0), (255, 255, 255)),
    (plain("1", 0, transparency=0), (255, 255, 255)),
    (plain("L", 100), (100, 100, 100)),
    (plain("L", 100, transparency=100), (255, 255, 255)),
    (plain("LA", (50, 128)), (152, 152, 152)),
    (plain("La", (25, 128)), (152, 152, 152)),
    (plain("P", 1), (200, 100, 40)),
    (plain("P", 1, transparency=1), (255, 255, 255)),
    (plain("P", 1, transparency=0), (200, 100, 40)),
    (plain("P", 1, transparency=bytes([255, 64])), (241, 216, 201)),
    (plain("PA", (1, 64)), (241, 216, 201)),
    (plain("RGB", (10, 20, 30)), (10, 20, 30)),
    (plain("RGB", (10, 20, 30), transparency=(10, 20, 30)), (255, 255, 255)),
    (plain("RGBA", (200, 100, 40, 64)), (241, 216, 201)),
    (plain("RGBA", (200, 100, 40, 0)), (255, 255, 255)),
    (plain("RGBa", (50, 25, 10, 64)), (241, 216, 201)),
    (plain("RGBX", (10, 20, 30, 0)), (10, 20, 30)),
    (plain("CMYK", (0, 255, 51, 51)), (204, 0, 163)),
    (plain("YCbCr", (100, 128, 178)), (170, 64, 100)),
    (plain("HSV", (85, 255, 200)), (0, 200, 0)),
    (plain("LAB", (138, 209, 198)), (255, 0, 0)),  # red, in CIELAB under D50
    (plain("I", 30000), (117, 117, 117)),
    (plain("I;16", 30000), (117, 117, 117)),
    (plain("I;16B", 30000), (117, 117, 117)),
    (plain("F", 0.4), (102, 102, 102)),
]


@pytest.mark.parametrize(("image", "rgb"), MODES, ids=[f"{i.mode}-{i.info or ''}" for i, _ in MODES])
def test_every_mode_becomes_rgb_with_transparency_on_white(image, rgb):
    got = in_bytes(read(image))
    assert got.shape == (H, W, 3) and (got == got[0, 0]).all()
    assert np.abs(got[0, 0] - rgb).max() <= (4 if image.mode == "LAB" else 1)


TURNS = [lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud]
TURNS += [
    lambda a: a.swapaxes(0, 1),
    lambda a: np.rot90(a, -1),
    lambda a: np.rot90(a, 2).swapaxes(0, 1),
    np.rot90,
]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_turned_as_its_exif_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    raw = np.asarray(Image.open(save(tmp_path / "plain.jpg")))
    got = in_bytes(read(save(tmp_path / "turned.jpg", exif=exif)))
    np.testing.assert_array_equal(got, TURNS[orientation - 1](raw))


def test_a_jpeg_is_turned_though_another_exif_tag_is_broken(tmp_path):
    # Orientation 6, then a unit of resolution that is text.
    tags = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x128, 2, 2, b"a")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    assert read(save(tmp_path / "a.jpg", exif=exif)).size == (H, W)


FORMS = {
    "PIL": (Image.fromarray(RGB), 0),
    "RGBA": (Image.fromarray(RGB).convert("RGBA"), 0),
    "uint8 array": (RGB, 0),
    "read-only array": (np.frombuffer(RGB.tobytes(), np.uint8).reshape(RGB.shape), 0),
    "BGR turned": (RGB[..., ::-1].copy()[..., ::-1], 0),
    "column-major array": (np.asfortranarray(RGB), 0),
    "float64 array": (UNIT, 0),
    "big-endian array": (UNIT.astype(">f4"), 0),
    "float16 array": (UNIT.astype(np.float16), 2**-10),
    "opaque array": (np.dstack([UNIT, np.ones((H, W))]), 0),
    "uint8 tensor": (CHW, 0),
    "float32 tensor": (CHW / 255, 0),
    "tensor with gradient": ((CHW / 255).requires_grad_(), 0),
    "bf16 tensor": ((CHW / 255).bfloat16(), 2**-8),
    "opaque tensor": (torch.cat([CHW, torch.full_like(CHW[:1], 255)]), 0),
}


@pytest.mark.parametrize(("image", "tolerance"), FORMS.values(), ids=FORMS)
def test_every_form_of_a_picture_gives_the_same_pixels(image, tolerance):
    picture = read(image)
    assert picture.size == (W, H) and picture.name is None
    torch.testing.assert_close(picture.pixels, PICTURE.pixels, rtol=0, atol=tolerance + 2e-7)
    assert tolerance or (in_bytes(picture) == RGB).all()


@pytest.mark.parametrize("form", [lambda a: a, torch.from_numpy], ids=["array", "tensor"])
@pytest.mark.parametrize("scale", [1, 255])
def test_grey_and_transparent_arrays(form, scale):
    grey = BYTES[..., 0] if scale == 1 else BYTES[..., 0] / np.float32(255)
    for axis in (0 if form is torch.from_numpy else 2, None):
        got = in_bytes(read(form(grey if axis is None else np.expand_dims(grey, axis))))
        np.testing.assert_array_equal(got, np.repeat(BYTES[..., :1], 3, axis=2))
    clear = BYTES if scale == 1 else BYTES / np.float32(255)
    got = in_bytes(read(form(clear.transpose(2, 0, 1).copy() if form is torch.from_numpy else clear)))
    alpha = BYTES[..., 3:] / 255
    assert np.abs(got - (RGB * alpha + 255 * (1 - alpha))).max() <= 0.501
    assert np.abs(got - in_bytes(read(Image.fromarray(BYTES)))).max() <= 1


def test_all_bytes_come_back_exactly_and_the_original_is_untouched():
    steps = np.arange(256, dtype=np.uint8).reshape(16, 16)
    array = np.stack([steps, steps.T, 255 - steps], -1)
    values = array / np.float32(255)
    before = values.copy()
    for image in (array, values):
        picture = read(image)
        assert picture.pixels.min() == -1 and picture.pixels.max() == 1
        np.testing.assert_array_equal(in_bytes(picture), array)
        picture.pixels.zero_()
    np.testing.assert_array_equal(values, before)


def test_slight_overshoot_is_kept():
    array = np.full((16, 16), 1.2)
    array[0] = -0.2
    pixels = read(array).pixels
    torch.testing.assert_close((pixels.min(), pixels.max()), (torch.tensor(-1.4), torch.tensor(1.4)))


def test_none_a_list_and_a_batch():
    assert images.load_pictures("image", None) == []
    other = 255 - RGB
    many = [
        np.stack([RGB, other]),
        torch.stack([CHW, 255 - CHW]),
        [RGB, Image.fromarray(other)],
        (CHW, other),
    ]
    for batch in many:
        first, second = images.load_pictures("image", batch)
        assert (in_bytes(first) == RGB).all() and (in_bytes(second) == other).all()


def test_paths_and_file_urls(tmp_path, monkeypatch):
    path = save(tmp_path / "a b.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for source in (path, str(path), Path("a b.png"), "~/a b.png", Path("~/a b.png"), path.as_uri()):
        picture = read(source)
        assert picture.name == str(source) and (in_bytes(picture) == RGB).all()


@pytest.mark.parametrize("kind", ["PIL", "png", "gif"])
def test_reading_and_resizing_give_no_warnings(tmp_path, kind):
    source = Image.fromarray(RGB) if kind == "PIL" else save(tmp_path / f"a.{kind}")
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            images.lanczos(read(source), (16, 16))
            gc.collect()
    finally:
        torch.set_warn_always(False)
    assert [str(w.message) for w in caught] == []


class Server(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):  # noqa: N802
        if self.path != "/cut.png":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", "9999")
        self.end_headers()
        self.wfile.write(b"\x89PNG")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    save(folder / "a.png")
    (folder / "page.png").write_text("<html>Log in</html>")
    with (
        pytest.MonkeyPatch.context() as patch,
        ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=folder)) as server,
    ):
        patch.setenv("no_proxy", "*")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_url_is_fetched(url):
    for source in (f"{url}/a.png", f"{url.replace('http', 'HTTP')}/a.png?size=1"):
        picture = read(source)
        assert picture.name == source and (in_bytes(picture) == RGB).all()


@pytest.mark.parametrize("page", ["none.png", "page.png", "cut.png", "not there.png", "图.png"])
def test_a_url_without_an_image_is_named(url, page):
    refused(
        f"{url}/{page}",
        f"{url}/{page}",
        *{"none.png": ["Not Found"], "page.png": ["not an image"]}.get(page, []),
    )


@pytest.mark.parametrize("source", ["http://127.0.0.1:x/a.png", "http://[1/a.png", "http:///a.png"])
def test_an_impossible_url_is_named(source):
    refused(source, source)


def cut(image_format="PNG"):
    data = io.BytesIO()
    Image.fromarray(np.tile(BYTES, (4, 4, 1))).save(data, image_format)
    return data.getvalue()[: len(data.getvalue()) // 2]


FILES = {
    "text.png": b"hello",
    "none.png": b"",
    "cut.png": cut(),
    "cut.dds": cut("DDS"),
    "bad.ppm": b"P6 9x9 255\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_image_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    refused(tmp_path / name, tmp_path / name)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").as_uri()):
        refused(source, source, error=FileNotFoundError)
    refused([RGB, "nowhere.png"], "image[1]", "nowhere.png", error=FileNotFoundError)
    refused(tmp_path, tmp_path)


def holed():
    array = UNIT.copy()
    array[3, 3, 1] = np.nan
    return array


SHAPES = ["'h w'", "'h w 1'", "'h w 3'", "'h w 4'", "channels first"]
REFUSED = [
    (holed(), ["nan", "[0, 1]"]),
    (np.linspace(-1, 1, 1200).reshape(H, -1), ["-1 to 1", "[0, 1]"]),
    (PICTURE.pixels, ["-1 to 1", "[0, 1]"]),
    (RGB.astype(np.float32), ["0 to 255", "[0, 1]", "uint8"]),
    (RGB.astype(np.int64), ["int64", "uint8", "[0, 1]"]),
    (CHW.long(), ["int64", "uint8", "[0, 1]"]),
    (RGB.astype(bool), ["bool", "uint8"]),
    (RGB.astype(object), ["object", "uint8"]),
    (BYTES[..., :2], ["(24, 40, 2)", *SHAPES]),
    (BYTES[0, :, 0], ["(40,)", *SHAPES]),
    (RGB[:0], ["(0, 40, 3)", *SHAPES]),
    (RGB[None, None], ["(1, 1, 24, 40, 3)", *SHAPES]),
    (CHW[:2], ["(2, 24, 40)", *SHAPES]),
    (torch.from_numpy(RGB.copy()), ["(24, 40, 3)", *SHAPES]),
    (np.stack([RGB, RGB])[..., :2], ["image[0]", "(24, 40, 2)"]),
    ([], ["empty list", "at least one"]),
    (RGB[None][:0], ["empty", "at least one"]),
    ({"a": 1}, ["dict {'a': 1}", "PIL image", "path", "URL", "array", "tensor"]),
    ([RGB, 3], ["image[1]", "int 3"]),
    ([[RGB]], ["image[0]", "list"]),
    ([RGB, None], ["image[1]", "None"]),
    (Image.new("RGB", (1, 64)), ["1x64", "at least 16"]),
    (RGB[:15], ["40x15", "at least 16"]),
    (plain("F", 2.0), ["'F'", "0 to 1", "2 to 2"]),
    (plain("F", float("nan")), ["'F'", "0 to 1", "nan"]),
    (plain("I", -2), ["'I'", "0 to 65535", "-2 to -2"]),
    (Image.open(io.BytesIO(cut())), ["truncated"]),
]


@pytest.mark.parametrize(("image", "parts"), REFUSED, ids=[" ".join(parts)[:30] for _, parts in REFUSED])
def test_what_is_no_image_is_refused_with_the_value_and_the_rule(image, parts):
    refused(image, *parts)


# ---- sizes ----


def true_floor(size, area):
    """The rule in 60 digits: a whole number is far from every root that is not whole."""
    with localcontext(prec=60):
        w, h = map(Decimal, size)
        return tuple(int((area * ratio).sqrt() // 16) * 16 for ratio in (w / h, h / w))


def test_floor_size_is_the_official_one_except_where_that_rounds_wrongly():
    cases = [(tuple(c["image_wh"]), c["max_area"], tuple(c["i2v_out_wh"])) for c in SIZES["i2v"]]
    ours = {(size, area): images.floor_size(size, area, (16, 16)) for size, area, _ in cases}
    different = [(size, area, out) for size, area, out in cases if ours[size, area] != out]
    assert different == [((832, 480), 832 * 480, (832, 464))]
    assert ours[(832, 480), 832 * 480] == true_floor((832, 480), 832 * 480) == (832, 480)


def test_closest_size_is_the_official_one():
    for case in SIZES["ti2v"]:
        assert case["max_area"] == AREA
        assert images.closest_size(tuple(case["image_wh"]), AREA, (32, 32)) == tuple(case["ti2v_out_wh"])


def test_sizes_are_whole_cells_within_the_area():
    rng = random.Random(0)
    for _ in range(500):
        short, area = rng.randint(16, 3000), rng.randint(40_000, 2_000_000)
        size = rng.sample([short, rng.randint(short, 8 * short)], 2)
        assert images.floor_size(size, area, (16, 16)) == true_floor(size, area)
        for rule in (images.floor_size, images.closest_size):
            for cell in ((16, 16), (32, 32), (32, 16)):
                w, h = rule(size, area, cell)
                assert 0 < w * h <= area and w % cell[0] == 0 and h % cell[1] == 0


def test_aspect_may_be_eight_and_no_more():
    for size in ((128, 16), (16, 128), (40, 24)):
        images.check_aspect("image", images.Picture(torch.zeros(3, *size)))
    for w, h in ((129, 16), (16, 129)):
        with pytest.raises(ValueError, match=f"^last_image has {w}x{h} pixels.*from 1:8 to 8:1; crop it"):
            images.check_aspect("last_image", images.Picture(torch.zeros(3, h, w)))


# ---- fitting ----


def test_bicubic_is_the_official_one():
    io = golden("pipe_i2v_unipc").io
    want = io["image_resized"]
    got = images.bicubic(read(io["image_uint8_hwc"].numpy()), (want.shape[2], want.shape[1])).pixels
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_lanczos_crop_is_the_official_one():
    io = golden("pipe_ti2v_image").io
    want = io["image_cropped_uint8_hwc"].numpy()
    got = images.fit_picture(read(io["image_uint8_hwc"].numpy()), want.shape[1::-1], "crop", images.lanczos)
    np.testing.assert_array_equal(in_bytes(got), want)


def slow_bicubic(size):
    return F.interpolate(PICTURE.pixels[None], size[::-1], mode="bicubic")[0]


def slow_lanczos(size):
    resized = np.asarray(Image.fromarray(RGB).resize(size, Image.Resampling.LANCZOS))
    return torch.tensor(resized).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize(
    "size", [(64, 32), (32, 64), (16, 16), (33, 19), (80, 48), (200, 17), (41, 24), (40, 27)]
)
@pytest.mark.parametrize("resize", ["bicubic", "lanczos"])
@pytest.mark.parametrize("fit", images.FITS)
def test_a_fitted_picture_is_centred(fit, resize, size):
    slow = slow_bicubic if resize == "bicubic" else slow_lanczos
    (w, h), scales = size, (Fraction(size[0], W), Fraction(size[1], H))
    scale = max(scales) if fit == "crop" else min(scales)
    want = slow(size if fit == "stretch" else (round(W * scale), round(H * scale)))
    if fit == "crop":
        top, left = (want.shape[1] - h) // 2, (want.shape[2] - w) // 2
        want = want[:, top : top + h, left : left + w]
    elif fit == "pad":
        canvas = torch.full((3, h, w), -1.0)
        top, left = (h - want.shape[1]) // 2, (w - want.shape[2]) // 2
        canvas[:, top : top + want.shape[1], left : left + want.shape[2]] = want
        want = canvas
    got = images.fit_picture(images.Picture(PICTURE.pixels, "a.png"), size, fit, getattr(images, resize))
    assert got.size == size and got.name == "a.png"
    torch.testing.assert_close(got.pixels, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("resize", [images.bicubic, images.lanczos])
@pytest.mark.parametrize("fit", images.FITS)
def test_a_picture_of_the_size_stays_as_it_is(fit, resize):
    sharp = images.Picture(PICTURE.pixels * 1.1)  # what 8 bits would change
    assert torch.equal(images.fit_picture(sharp, (W, H), fit, resize).pixels, sharp.pixels)


def test_pictures_are_spread_over_the_videos():
    assert images.one_per_video("a", 3) == ["a", "a", "a"]
    assert images.one_per_video("ab", 2) == ["a", "b"]
    assert images.one_per_video("ab", 6) == ["a", "a", "a", "b", "b", "b"]
