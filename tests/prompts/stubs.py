"""Chat models for tests: a function that remembers, and a server that speaks OpenAI's protocol."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Remembering:
    """Answers with one text and keeps what it was asked."""

    def __init__(self, answer="A fox."):
        self.answer = answer
        self.messages = None
        self.seed = None

    def __call__(self, messages, *, seed=None):
        self.messages, self.seed = messages, seed
        return self.answer


def completion(text, reason="stop"):
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": reason}]})


@contextmanager
def serving(body="", status=200, headers=(), respond=None):
    """Yield (URL, list of requests as (path, headers, body)) of a server that answers each with `body`.

    `respond`, given the handler, answers in its place.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers.get("Content-Length", 0))
            requests.append((self.path, dict(self.headers), self.rfile.read(length)))
            if respond:
                respond(self)
                return
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else body.encode())

        do_GET = do_POST  # noqa: N815 (http.server wants it so)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
