"""A Hub on loopback: one model repository, served over real HTTP from a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "a" * 40


@contextmanager
def serving(folder: Path, repository: str) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder` as `repository`; gives the endpoint and the list of files that are fetched."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
            if path.startswith(f"/{repository}/resolve/"):
                name = path.removeprefix(f"/{repository}/resolve/").partition("/")[2]
                if body:
                    fetched.append(name)
                self.reply(files[name], body, ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"')
            elif path == f"/api/models/{repository}/tree/{SHA}":
                entries = [{"type": "file", "path": n, "size": len(d), "oid": n} for n, d in files.items()]
                self.reply(json.dumps(entries).encode(), body)
            elif path.startswith(f"/api/models/{repository}"):
                siblings = [{"rfilename": name} for name in files]
                self.reply(json.dumps({"id": repository, "sha": SHA, "siblings": siblings}).encode(), body)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def reply(self, data: bytes, body: bool, **headers: str) -> None:
            self.send_response(200)
            for key, value in {"X-Repo-Commit": SHA, "Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
