"""A static HTTP server of a folder, as repositories are handed out."""

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StaticFiles(http.server.SimpleHTTPRequestHandler):
    """Hands out files; answers ranges as servers do, and may cut a download."""

    cut_after: int | None = None
    asked: list[tuple[str, str | None]]
    # Of bodies.
    sent_bytes = 0

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        self.asked.append((self.path, self.headers["Range"]))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        start = int((self.headers["Range"] or "bytes=0-")[6:].rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        if type(self).cut_after is not None and len(body) > type(self).cut_after:
            self.wfile.write(body[: type(self).cut_after])
            self.wfile.flush()
            self.connection.close()
            return
        type(self).sent_bytes += len(body)
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        return


@contextmanager
def static_server(folder: Path) -> Iterator[tuple[str, type[StaticFiles]]]:
    """Yield the URL of a folder, and the class whose attributes say how it answers."""
    kind = type("Served", (StaticFiles,), {"asked": [], "cut_after": None})
    handler = functools.partial(kind, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", kind
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
