"""Answers of servers: which redirects are followed, what is read, how addresses are told."""

import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from wan22 import web

LIMITS = {"silence": 1, "total": 3, "most": 1000}


@contextmanager
def site(pages):
    """Yield a server's address and a list of what was asked.

    `pages` are (status, headers, body) by path, or functions that answer, given the handler.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if callable(pages[self.path]):
                pages[self.path](self)
                return
            status, headers, body = pages[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def handle(self):
            with suppress(ConnectionError):  # a client that has seen enough
                super().handle()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def moved(target, status=302):
    return status, {"Location": target}, bytes(10_000)


def test_redirects_are_followed_within_the_web_alone():
    pages = {"/a": moved("/b"), "/b": moved("c", 308), "/c": (200, {"X-Kind": "c"}, b"found")}
    pages |= {"/loop": moved("/loop"), "/nowhere": moved(""), "/file": moved("file:///etc/passwd")}
    pages |= {"/ftp": moved("ftp://127.0.0.1/x"), "/data": moved("data:,a"), "/user": moved("http://u:p@h/")}
    with site(pages) as (url, asked):
        answer = web.fetch(f"{url}/a", **LIMITS)
        assert (answer.body, answer.url, answer.headers["x-kind"]) == (b"found", f"{url}/c", "c")
        assert web.fetch(f"{url}/a", redirects=0, **LIMITS).status == 302
        for path, said in (("file", "not on http"), ("ftp", "not on http"), ("data", "not on http")):
            with pytest.raises(web.WebError, match=said):
                web.fetch(f"{url}/{path}", **LIMITS)
        with pytest.raises(web.WebError, match="more than 5 times"):
            web.fetch(f"{url}/loop", **LIMITS)
        with pytest.raises(web.WebError, match="to nowhere"):
            web.fetch(f"{url}/nowhere", **LIMITS)
        with pytest.raises(web.WebError, match="redirected") as caught:
            web.fetch(f"{url}/user", **LIMITS)
        assert "u:p" not in str(caught.value)
    assert asked.count("/loop") == 6


def test_a_large_answer_is_an_error_and_a_large_refusal_is_cut_off():
    pages = {"/a": (200, {}, bytes(1001)), "/b": (500, {}, bytes(10**6)), "/c": (200, {}, bytes(1000))}
    pages |= {
        "/short": (200, {"Content-Length": "9"}, b"abc"),
        "/long": (200, {"Content-Length": "1001"}, b""),
    }
    with site(pages) as (url, _):
        for path, said in (("a", "more than 1000"), ("long", "has 1001"), ("short", "6 bytes before")):
            with pytest.raises(web.WebError, match=said):
                web.fetch(f"{url}/{path}", **LIMITS)
        assert len(web.fetch(f"{url}/b", **LIMITS).body) == 1000
        assert len(web.fetch(f"{url}/c", **LIMITS).body) == 1000


def test_an_address_is_asked_for_in_ascii():
    with site({"/%E5%9B%BE.png?a=%C3%A9": (200, {}, b"x")}) as (url, _):
        assert web.fetch(f"{url}/图.png?a=é#part", **LIMITS).body == b"x"


@pytest.mark.parametrize(
    "url",
    [
        *("", "http://", "file:///a", "ftp://a/b", "http://a:x/", "http://a:99999/", "http://[::1/x"),
        *("http://a b/", "http://a/\r\nX: y", "http://u:secret@a/", "http://u:sec ret@a/", "http://a\0/"),
        "http://" + "a" * 70,
    ],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="must be an address") as caught:
        web.check_url("image", url)
    assert "sec" not in str(caught.value) and "\n" not in str(caught.value)
