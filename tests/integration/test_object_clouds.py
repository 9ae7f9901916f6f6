"""Stores of Google and Azure, against a server of the test that knows the few calls of each that bytes need.

Not their services: what is shown is that our sections reach obstore as they should, that requests go where each
protocol has them, and that metadata and versions come back. Signing is obstore's, and not tried here.
"""

from __future__ import annotations

import json
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from xferd.api.errors import NotFound, Stale
from xferd.plugins.base import Chunk, Extent, MappedSpace, ObjectSpace, ObjectVersion
from xferd.plugins.object import ObjectBackend, ObjectOptions

NBYTES = 200_000


class Cloud(BaseHTTPRequestHandler):
    """Keeps whole objects by path; answers PUT, GET of ranges with If-Match, HEAD and DELETE."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[bytes, dict[str, str], str]]

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        kept = {name: value for name, value in self.headers.items() if "-meta-" in name.lower()}
        self.objects[self.path] = data, kept, f'"{len(self.objects)}-{hash(data)}"'
        self._answer(201, b"", {"ETag": self.objects[self.path][2]})

    def do_GET(self) -> None:
        if self.path not in self.objects:
            self._answer(404, b"", {})
            return
        data, kept, etag = self.objects[self.path]
        if self.headers.get("If-Match", etag) != etag:
            self._answer(412, b"", {})
            return
        facts = {"ETag": etag, "Last-Modified": formatdate(usegmt=True), **kept}
        span = self.headers.get("Range") or self.headers.get("x-ms-range")
        if span is None:
            self._answer(200, data, facts)
            return
        first, last = (int(part) for part in span.partition("=")[2].split("-"))
        facts["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._answer(206, data[first : last + 1], facts)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        self._answer(202 if self.objects.pop(self.path, None) else 404, b"", {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def cloud():
    handler = type("Handler", (Cloud,), {"objects": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler.objects
        server.shutdown()
        thread.join()


SECTIONS = {
    "gs": ({"url": "gs://bucket/prefix"}, "", "/bucket/prefix%2Fkey", "x-goog-meta-xferdxxh3"),
    "az": ({"url": "az://bucket/prefix", "account": "me"}, "/me", "/me/bucket/prefix/key", "x-ms-meta-xferdxxh3"),
}


@pytest.mark.parametrize("scheme", SECTIONS)
async def test_an_object_goes_and_comes_back(cloud, scheme, tmp_path):
    endpoint, objects = cloud
    section, below, path, header = SECTIONS[scheme]
    store = {**section, "endpoint": endpoint + below, "allow_http": True}
    if scheme == "gs":  # writes are never anonymous there; this is how emulators are told to ask for no token
        account = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
        (tmp_path / "account.json").write_text(json.dumps(account))
        store["credentials_file"] = str(tmp_path / "account.json")
    else:
        store["anonymous"] = True
    backend = ObjectBackend(ObjectOptions.model_validate({"stores": {"c": store}}))
    await backend.start()
    try:
        data = np.random.default_rng(1).integers(0, 256, NBYTES, dtype=np.uint8)
        memory = Extent(MappedSpace(), np.array([[data.ctypes.data, NBYTES]], dtype=np.uint64))
        assert await backend.find_object("c", "key") is None
        space = ObjectSpace("c", "key", NBYTES, ObjectVersion())
        whole = Extent(space, np.array([[0, NBYTES]], dtype=np.uint64))
        await backend.move(Chunk(memory, whole, NBYTES, "t", "c"))
        [(where, (kept, headers, _))] = objects.items()
        assert (where.partition("?")[0], kept) == (path, data.tobytes())
        assert [name.lower() for name in headers] == [header]
        back = np.zeros(NBYTES, dtype=np.uint8)
        target = Extent(MappedSpace(), np.array([[back.ctypes.data, NBYTES]], dtype=np.uint64))
        await backend.move(Chunk(whole, target, NBYTES, "t", "c"))
        assert (back == data).all()
        assert backend.verified_reads == 1
        facts = await backend.find_object("c", "key")
        assert (facts.nbytes, facts.etag) == (NBYTES, space.version.etag)
        objects[where] = kept, headers, '"another"'
        with pytest.raises(Stale):
            await backend.move(Chunk(whole, target, NBYTES, "t", "c"))
        objects.clear()
        with pytest.raises(NotFound):
            await backend.move(Chunk(whole, target, NBYTES, "t", "c"))
    finally:
        await backend.aclose()
