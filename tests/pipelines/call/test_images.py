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
from diffusers.video_processor import VideoProcessor
from PIL import Image

from tests.golden_data import FOLDER, golden
from wan22.pipelines.call import images

W, H = 40, 24
BYTES = np.random.default_rng(0).integers(0, 256, (H, W, 4), np.uint8)
RGB = BYTES[..., :3]
UNIT = RGB / 255
CHW = torch.from_numpy(RGB.copy()).permute(2, 0, 1)
PICTURE = images.Picture(CHW / 127.5 - 1, "a.png")
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


def save(path, **options):
    Image.fromarray(RGB).save(path, **options)
    return path


def cut(form):
    data = io.BytesIO()
    Image.fromarray(np.tile(BYTES, (4, 4, 1))).save(data, form)
    return data.getvalue()[: data.tell() // 2]


def refused(image, *parts, error=ValueError):
    with pytest.raises(error) as caught:
        images.load_pictures("image", image)
    message = str(caught.value)
    assert message.startswith("image") and [part for part in parts if str(part) not in message] == []


# ---- reading ----

KEY = (10, 20, 30)
OPAQUE = [
    ((255, 255, 255), [plain("1", 1)]),
    ((100, 100, 100), [plain("L", 100)]),
    ((200, 100, 40), [plain("P", 1), plain("P", 1, transparency=0)]),
    (KEY, [plain("RGB", KEY), plain("RGBX", (*KEY, 0))]),
    ((204, 0, 163), [plain("CMYK", (0, 255, 51, 51))]),
    ((170, 64, 100), [plain("YCbCr", (100, 128, 178))]),
    ((0, 200, 0), [plain("HSV", (85, 255, 200))]),
    ((255, 0, 0), [plain("LAB", (138, 209, 198))]),  # red under D50; its 8 bits are coarse
    ((117, 117, 117), [plain("I", 30000), plain("I;16", 30000), plain("I;16B", 30000)]),
    ((102, 102, 102), [plain("F", 0.4)]),
]
ON_WHITE = [
    ((255, 255, 255), [plain("1", 1, transparency=0), plain("1", 0, transparency=0)]),
    ((255, 255, 255), [plain("L", 9, transparency=9), plain("P", 1, transparency=1)]),
    ((255, 255, 255), [plain("RGB", KEY, transparency=KEY), plain("RGBA", (*KEY, 0))]),
    ((152, 152, 152), [plain("LA", (50, 128)), plain("La", (25, 128))]),  # a half of 50
    ((241, 216, 201), [plain("P", 1, transparency=bytes([255, 64])), plain("PA", (1, 64))]),  # a quarter
    ((241, 216, 201), [plain("RGBA", (200, 100, 40, 64)), plain("RGBa", (50, 25, 10, 64))]),
]


@pytest.mark.parametrize(("image", "rgb"), [(i, rgb) for rgb, many in OPAQUE + ON_WHITE for i in many])
def test_every_mode_becomes_rgb_with_transparency_on_white(image, rgb):
    got = in_bytes(read(image))
    assert got.shape == (H, W, 3) and (got == got[0, 0]).all()
    assert np.abs(got[0, 0] - rgb).max() <= (5 if image.mode == "LAB" else 0)


# Steps along the stored rows and columns; from the fifth on they are exchanged.
TURNS = [(1, 1), (1, -1), (-1, -1), (-1, 1), (1, 1), (-1, 1), (-1, -1), (1, -1)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_turned_as_its_exif_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    rows, columns = TURNS[orientation - 1]
    want = np.asarray(Image.open(save(tmp_path / "plain.jpg")))[::rows, ::columns]
    got = in_bytes(read(save(tmp_path / "turned.jpg", exif=exif)))
    np.testing.assert_array_equal(got, want.swapaxes(0, 1) if orientation > 4 else want)


def test_a_jpeg_is_turned_though_another_exif_tag_is_broken(tmp_path):
    # Orientation 6, then a unit of resolution that is text.
    tags = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x128, 2, 2, b"a")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    assert read(save(tmp_path / "a.jpg", exif=exif)).size == (H, W)


PIL = Image.fromarray(RGB)
OPAQUE_TENSOR = torch.cat([CHW, torch.full_like(CHW[:1], 255)])
FORMS = {
    "PIL": [PIL, PIL.convert("RGBA")],
    "array": [RGB, UNIT, UNIT.astype(np.float32), np.dstack([UNIT, np.ones((H, W))])],
    "tensor": [CHW, (CHW / 255).requires_grad_(), OPAQUE_TENSOR, OPAQUE_TENSOR / 255],
    "read-only or column-major": [np.broadcast_to(RGB, RGB.shape), np.asfortranarray(RGB)],
    "reversed": [RGB[..., ::-1].copy()[..., ::-1]],
    "big-endian": [UNIT.astype(">f4")],
}


@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
def test_every_form_of_a_picture_gives_the_same_pixels(forms):
    for image in forms:
        picture = read(image)
        assert picture.size == (W, H) and picture.name is None and (in_bytes(picture) == RGB).all()
        torch.testing.assert_close(picture.pixels, PICTURE.pixels, rtol=0, atol=2e-7)


def test_half_precision_is_read():
    for image, tolerance in ((UNIT.astype(np.float16), 2**-11), ((CHW / 255).bfloat16(), 2**-8)):
        torch.testing.assert_close(read(image).pixels, PICTURE.pixels, rtol=0, atol=tolerance)


def test_grey_and_transparent_arrays_and_tensors():
    alpha = BYTES[..., 3:] / 255
    on_white = RGB * alpha + 255 * (1 - alpha)
    assert np.abs(in_bytes(read(Image.fromarray(BYTES))) - on_white).max() <= 1
    for array in (BYTES, BYTES / np.float32(255), BYTES / 255):
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        for grey in (array[..., 0], array[..., :1], tensor[0], tensor[:1]):
            np.testing.assert_array_equal(in_bytes(read(grey)), BYTES[..., :1].repeat(3, axis=2))
        for clear in (array, tensor):
            assert np.abs(in_bytes(read(clear)) - on_white).max() <= 0.501


def test_all_bytes_come_back_exactly_and_the_original_is_untouched():
    steps = np.arange(256, dtype=np.uint8).reshape(16, 16)
    array = np.stack([steps, steps.T, 255 - steps], -1)
    values = array / np.float32(255)
    before = values.copy()
    for image in (array, values, torch.from_numpy(values).permute(2, 0, 1)):
        picture = read(image)
        assert picture.pixels.min() == -1 and picture.pixels.max() == 1
        np.testing.assert_array_equal(in_bytes(picture), array)
        picture.pixels.zero_()
    np.testing.assert_array_equal(values, before)
    assert read(values * 1.2).pixels.max() > 1.39  # a slight overshoot is kept


def test_negative_values_mean_minus_1_to_1(caplog):
    """As in diffusers: for all images of the argument together."""
    dark, bright = torch.rand(3, H, W) * 2 - 1, torch.rand(3, H, W)
    theirs = VideoProcessor(vae_scale_factor=8).preprocess([dark, bright], height=H, width=W)
    for given in ([dark, bright], torch.stack([dark, bright]), [dark.permute(1, 2, 0).numpy(), bright]):
        ours = torch.stack([picture.pixels for picture in images.load_pictures("image", given)])
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(read(bright).pixels, 2 * bright - 1)
    assert "image has negative values: it is taken to be in [-1, 1]" in caplog.text


@pytest.mark.parametrize("start", ["data:image/png;base64,", "", "file:///"])
def test_a_long_source_is_short_in_the_error(start):
    with pytest.raises((ValueError, OSError)) as error:
        read(start + "A" * 50_000)
    assert len(str(error.value)) < 1000


def test_none_lists_and_batches():
    assert images.load_pictures("image", None) == []
    other = 255 - RGB
    lists = [RGB, Image.fromarray(other)], (CHW, other)
    for batch in (*lists, np.stack([RGB, other]), torch.stack([CHW, 255 - CHW])):
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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images.lanczos(read(source), (16, 16))
        gc.collect()
    torch.set_warn_always(False)
    assert [str(w.message) for w in caught] == []


class Site(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path != "/cut.png":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", "9999")
        self.end_headers()
        self.wfile.write(b"\x89PNG")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web server: an image, a page that calls itself one, and an answer that breaks off."""
    save(tmp_path / "a.png")
    (tmp_path / "page.png").write_text("<html>Log in</html>")
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls(site):
    for source in (f"{site}/a.png", f"{site.replace('http', 'HTTP')}/a.png?size=1"):
        picture = read(source)
        assert picture.name == source and (in_bytes(picture) == RGB).all()
    refused(f"{site}/none.png", f"{site}/none.png", "cannot be fetched", "not found")
    refused([RGB, f"{site}/page.png"], "image[1]", f"{site}/page.png", "not an image")


@pytest.mark.parametrize("end", ["/cut.png", "/not there.png", "/图.png", "x/a.png"])
def test_every_error_of_a_url_is_a_value_error_that_names_it(site, end):
    refused(site + end, site + end)


@pytest.mark.parametrize("end", ["@[/a.png", ":secret@127.0.0.1/a.png"])
def test_a_user_and_a_password_are_not_told(site, end):
    place = f"http://***{end[end.index('@') :]}"
    refused(site + end, place, "without a user" if "secret" in end else "valid host")
    with pytest.raises(ValueError, match=r"\*\*\*") as caught:
        read(site + end)
    assert site not in str(caught.value) and "secret" not in str(caught.value)


FILES = {"text.png": b"hello", "none.png": b"", "bad.ppm": b"P6 9x9 255\n"}
FILES |= {f"cut.{form}": cut(form) for form in ("png", "dds", "tiff")}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_image_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    refused(tmp_path / name, tmp_path / name)


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    refused(tmp_path, tmp_path)
    path = tmp_path / "a.png"
    refused([RGB, path], "image[1]", path, error=FileNotFoundError)
    for source in (path, str(path), path.as_uri()):
        refused(source, source, error=FileNotFoundError)


SHAPES = ["'h w'", "'h w 1'", "'h w 3'", "'h w 4'", "channels first"]
LISTS = ["image[1]", "PIL image", "path", "URL", "array", "tensor"]
REFUSED = {
    "NaN": (["nan", "[0, 1]"], [UNIT * np.nan, np.where(RGB > 250, np.nan, UNIT)]),
    "-2 to 2": (["-2 to 2", "[0, 1]", "[-1, 1]"], [np.linspace(-2, 2, W * H).reshape(H, W)]),
    "0 to 255": (["0 to 255", "[0, 1]", "uint8"], [RGB.astype(np.float32), CHW.float()]),
    "int64": (["int64", "uint8", "[0, 1]"], [RGB.astype(np.int64), CHW.long()]),
    "objects": (["object", "uint8"], [RGB.astype(object)]),
    "2 channels": (["(24, 40, 2)", *SHAPES], [BYTES[..., :2], BYTES[None, ..., :2]]),
    "2 channels first": (["(2, 24, 40)", *SHAPES], [CHW[:2]]),
    "channels last": (["(24, 40, 3)", *SHAPES], [CHW.permute(1, 2, 0)]),
    "too few or many": (["40,", *SHAPES], [BYTES[0, :, 0], CHW[0, 0], RGB[:0], RGB[None, None]]),
    "nothing": (["image is an empty list", "at least one"], [[], (), RGB[None][:0]]),
    "another type": (["image must be", "dict {'a': 1}", *LISTS[1:]], [{"a": 1}]),
    "another type in a list": (LISTS, [[RGB, 3], [RGB, None], [RGB, [RGB]]]),
    "too thin": (["1x64", "at least 16"], [Image.new("RGB", (1, 64)), np.zeros((64, 1))]),
    "too flat": (["40x15", "at least 16"], [RGB[:15], CHW[:, :15]]),
    "F": (
        ["'F'", "0 to 1, not 0.5 to 2"],
        [Image.fromarray(np.linspace(0.5, 2, 400, dtype="f4").reshape(20, 20))],
    ),
    "F of NaN": (["'F'", "0 to 1, not nan"], [plain("F", float("nan"))]),
    "I": (["'I'", "0 to 65535, not -2 to -2"], [plain("I", -2)]),
    "cut": (["truncated"], [Image.open(io.BytesIO(cut("PNG")))]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_image_is_refused_with_the_value_and_the_rule(case):
    parts, wrong = REFUSED[case]
    for image in wrong:
        refused(image, *parts)


# ---- sizes ----


def true_floor(size, area):
    """The rule in 60 digits; a root that is a whole number is exact."""
    w, h = map(Decimal, size)
    with localcontext() as context:
        context.prec = 60
        return tuple(int((area * a / b).sqrt() / 16) * 16 for a, b in ((w, h), (h, w)))


def test_floor_size_is_the_official_one_except_where_that_rounds_wrongly():
    cases = [(tuple(c["image_wh"]), c["max_area"], tuple(c["i2v_out_wh"])) for c in SIZES["i2v"]]
    wrong = [(size, area) for size, area, out in cases if images.floor_size(size, area, (16, 16)) != out]
    assert wrong == [((832, 480), 832 * 480)]
    assert images.floor_size(*wrong[0], (16, 16)) == true_floor(*wrong[0]) == (832, 480)
    for side in (16, 480, 3200):
        for area, want in ((side**2, side), (side**2 - 1, side - 16)):
            assert images.floor_size((77, 77), area, (16, 16)) == (want, want)


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
    for h, w in ((128, 16), (16, 128), (24, 40)):
        images.check_aspect("image", images.Picture(torch.zeros(3, h, w)))
    for h, w in ((129, 16), (16, 129)):
        with pytest.raises(ValueError, match=f"^last_image has {w}x{h} pixels.*from 1:8 to 8:1; crop it"):
            images.check_aspect("last_image", images.Picture(torch.zeros(3, h, w)))


# ---- fitting ----


def test_bicubic_is_the_official_one():
    data = golden("pipe_i2v_unipc").io
    want = data["image_resized"]
    got = images.bicubic(read(data["image_uint8_hwc"].numpy()), want.shape[:0:-1]).pixels
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_lanczos_crop_is_the_official_one():
    data = golden("pipe_ti2v_image").io
    want = data["image_cropped_uint8_hwc"].numpy()
    got = images.fit_picture(read(data["image_uint8_hwc"].numpy()), want.shape[1::-1], "crop", images.lanczos)
    np.testing.assert_array_equal(in_bytes(got), want)


def resized(resize, size):
    if resize is images.bicubic:
        return F.interpolate(PICTURE.pixels[None], size[::-1], mode="bicubic")[0]
    array = np.asarray(Image.fromarray(RGB).resize(size, Image.Resampling.LANCZOS))
    return torch.tensor(array).permute(2, 0, 1) / 127.5 - 1


FITTED = [(64, 32), (32, 64), (16, 16), (33, 19), (80, 48), (200, 17), (41, 24), (40, 27)]


@pytest.mark.parametrize("size", FITTED)
@pytest.mark.parametrize("resize", [images.bicubic, images.lanczos])
def test_fitting_is_centred(resize, size):
    (w, h), scales = size, (Fraction(size[0], W), Fraction(size[1], H))
    over, inside = (resized(resize, (round(W * s), round(H * s))) for s in (max(scales), min(scales)))
    black = torch.full((3, h, w), -1.0)
    top, left = (h - inside.shape[1]) // 2, (w - inside.shape[2]) // 2
    black[:, top : top + inside.shape[1], left : left + inside.shape[2]] = inside
    top, left = (over.shape[1] - h) // 2, (over.shape[2] - w) // 2
    cropped = over[:, top : top + h, left : left + w]
    for fit, want in (("stretch", resized(resize, size)), ("crop", cropped), ("pad", black)):
        got = images.fit_picture(PICTURE, size, fit, resize)
        assert got.size == size and got.name == "a.png"
        torch.testing.assert_close(got.pixels, want, rtol=0, atol=1e-6)


def test_a_picture_of_the_size_stays_as_it_is():
    sharp = images.Picture(PICTURE.pixels * 1.1)  # what 8 bits would change
    for resize in (images.bicubic, images.lanczos):
        for fit in images.FITS:
            assert torch.equal(images.fit_picture(sharp, (W, H), fit, resize).pixels, sharp.pixels)


def test_pictures_are_spread_over_the_videos():
    for pictures, count, want in (
        ("a", 3, "aaa"),
        ("ab", 2, "ab"),
        ("ab", 6, "aaabbb"),
        ("abc", 6, "aabbcc"),
    ):
        assert images.one_per_video(pictures, count) == list(want)
