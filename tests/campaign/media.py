"""Recipes in media files, images, and servers that answer with either: refused, or what they were."""

import io
import json
import math
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.builders import random_pipeline
from tests.campaign.isolation import Trial
from tests.campaign.mutations import damages, documents
from wan22 import read_recipe
from wan22.pictures import read_picture
from wan22.pipelines.call.images import load_picture
from wan22.prompts import OpenAIChat
from wan22.video.metadata import PNG_KEY

ENDINGS = ("png", "jpg", "webp", "gif", "bmp", "tiff")


def pixels(ending: str) -> bytes:
    """Return a small picture in a format."""
    file = io.BytesIO()
    picture = Image.radial_gradient("L").resize((48, 32)).convert("RGB")
    picture.save(file, {"jpg": "jpeg"}.get(ending, ending))
    return file.getvalue()


class Recipes:
    """A recipe of which values are changed, in a PNG: refused, or a recipe of the right types."""

    name = "recipes"

    def __init__(self, folder: Path) -> None:
        pipe = random_pipeline()
        video = pipe("a cat", height=32, width=32, num_frames=5, num_inference_steps=1, seed=0)
        self.recipe = json.loads(video.recipe.to_json())

    def cases(self) -> st.SearchStrategy[Any]:
        return documents(self.recipe)

    def trial(self, case: bytes, folder: Path) -> Trial:
        path = folder / "stranger.png"

        def run() -> str | None:
            info = PngInfo()
            info.add_text(PNG_KEY, case.decode())
            Image.new("RGB", (16, 16)).save(path, pnginfo=info)
            recipe = read_recipe(path)
            str(recipe), recipe.of(0), recipe.prompts
            again = json.loads(recipe.to_json())
            return next(
                (f"{name} has another type" for name in again if not self.fits(name, again[name])), None
            )

        return Trial(run, path.name)

    def fits(self, name: str, value: Any) -> bool:
        """Whether a value of the recipe is of the type that it has when the library writes it."""
        own = self.recipe.get(name)
        if own is None or value is None:
            return value is None or isinstance(value, str | int | float | list | dict)
        if isinstance(own, int | float) and not isinstance(own, bool):
            return isinstance(value, int | float) and math.isfinite(value)
        return isinstance(value, type(own))


class Images:
    """Pictures in the usual formats with changed bytes, or cut off: refused, or some picture."""

    name = "images"

    def __init__(self, folder: Path) -> None:
        self.files = {ending: pixels(ending) for ending in ENDINGS}

    def cases(self) -> st.SearchStrategy[Any]:
        def of(ending: str) -> st.SearchStrategy[Any]:
            data = self.files[ending]
            parts = [(0, 64), (0, len(data)), (len(data) - 64, len(data))]
            return damages(parts).map(lambda change: (ending, change(data)))

        return st.sampled_from(ENDINGS).flatmap(of)

    def trial(self, case: tuple[str, bytes], folder: Path) -> Trial:
        ending, data = case
        path = folder / f"stranger.{ending}"

        def run() -> str | None:
            path.write_bytes(data)
            load_picture("image", str(path))
            return None

        return Trial(run, path.name)


class Server:
    """A server on this machine that answers each request in the same way, in a thread of its own."""

    def __init__(self, answer: Mapping[str, Any], body: bytes) -> None:
        self.answer, self.body = answer, body
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self.socket.accept()
            threading.Thread(target=self._talk, args=[connection], daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.recv(1 << 16)
                connection.sendall(self._head())
                self._send_body(connection)
            except OSError:  # the client has hung up
                pass

    def _head(self) -> bytes:
        length = {"right": len(self.body), "short": 3, "long": 10**12, "negative": -1, "none": None}
        lines = [f"HTTP/1.1 {self.answer['status']}", f"Content-Type: {self.answer['type']}"]
        if (number := length[self.answer["length"]]) is not None:
            lines.append(f"Content-Length: {number}")
        if self.answer["moved"]:
            lines.append(f"Location: {self.answer['moved'].replace('HERE', self.url)}")
        return "\r\n".join([*lines, "Connection: close", "", ""]).encode()

    def _send_body(self, connection: socket.socket) -> None:
        match self.answer["pace"]:
            case "whole":
                connection.sendall(self.body)
            case "silent":
                time.sleep(10**4)
            case "drips":
                while True:
                    connection.sendall(b" ")
                    time.sleep(0.5)
            case "endless":
                while True:
                    connection.sendall(bytes(1 << 20))


ANSWERS = st.fixed_dictionaries(
    {
        "status": st.sampled_from(
            ["200 OK"] * 6 + ["302 Found", "404 Not Found", "500 \x1b[31mno", "99 x", "x"]
        ),
        "type": st.sampled_from(("image/png", "application/json", "text/html", "\x1b[31m", "x" * 9000)),
        "length": st.sampled_from(("right", "none", "short", "long", "negative")),
        "moved": st.sampled_from(
            ("", "file:///etc/passwd", "HERE/again", "ftp://127.0.0.1/x", "HERE\x00", "//")
        ),
        "pace": st.sampled_from(["whole"] * 8 + ["silent", "drips", "endless"]),
    }
)


class ImageServers:
    """A picture from a server that answers anything: refused in time, or the picture."""

    name = "images from servers"

    def __init__(self, folder: Path) -> None:
        self.bodies = [pixels("png"), pixels("jpg"), b"", b"<html>", pixels("png")[:99]]

    def cases(self) -> st.SearchStrategy[Any]:
        return st.tuples(ANSWERS, st.sampled_from(self.bodies))

    def trial(self, case: tuple[Mapping[str, Any], bytes], folder: Path) -> Trial:
        def run() -> str | None:
            found = read_picture("image", f"{Server(*case).url}/a.png", timeout=3)
            return None if found.size == (48, 32) else f"a picture of size {found.size}"

        return Trial(run, "127.0.0.1")


class ChatServers:
    """A chat server that answers anything: refused in time, or a text without control characters."""

    name = "chat servers"

    def __init__(self, folder: Path) -> None:
        self.answer = {"choices": [{"message": {"content": "a fox"}, "finish_reason": "stop"}]}

    def cases(self) -> st.SearchStrategy[Any]:
        bodies = documents(self.answer) | st.binary(max_size=40) | st.just(json.dumps(self.answer).encode())
        return st.tuples(ANSWERS, bodies)

    def trial(self, case: tuple[Mapping[str, Any], bytes], folder: Path) -> Trial:
        def run() -> str | None:
            chat = OpenAIChat(f"{Server(*case).url}/v1", "m", api_key="sk-key", timeout=5)
            try:
                text = chat([])
            except (ValueError, OSError) as error:
                if "sk-key" in str(error):
                    return "the key is in the message"
                raise
            return None if text.isprintable() or "\n" in text else f"control characters: {text!r}"

        return Trial(run, "127.0.0.1")
