"""A server that speaks as much of S3 as a benchmark needs, from memory: run as a script, it prints its port.

Objects, ranges, metadata of users, uploads in parts. No signatures, no listings, no buckets: any name is one. Real
servers made for tests answer a range of a large object by copying all of it, which is what would be measured then.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, NamedTuple
from urllib.parse import parse_qs, urlsplit

MEANT_FOR_USERS = "x-amz-meta-"


class Stored(NamedTuple):
    """An object."""

    data: memoryview
    metadata: dict[str, str]
    etag: str
    modified: str


class Handler(BaseHTTPRequestHandler):
    """Answers requests of one connection, in a thread of its own."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    objects: ClassVar[dict[str, Stored]] = {}
    uploads: ClassVar[dict[str, tuple[dict[str, str], dict[int, bytes]]]] = {}
    lock: ClassVar[threading.Lock] = threading.Lock()

    def do_GET(self) -> None:
        """Answer an object, or a range of it."""
        self._give(with_body=True)

    def do_HEAD(self) -> None:
        """Answer what an object is."""
        self._give(with_body=False)

    def do_PUT(self) -> None:
        """Take an object, or a part of an upload."""
        path, query = self._target()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "uploadId" in query:
            with self.lock:
                self.uploads[query["uploadId"][0]][1][int(query["partNumber"][0])] = body
            self._answer(200, {"ETag": f'"{len(body)}"'})
            return
        stored = self._keep(path, body, self._metadata())
        self._answer(200, {"ETag": stored.etag})

    def do_POST(self) -> None:
        """Begin an upload in parts, or end it."""
        path, query = self._target()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "uploads" in query:
            name = os.urandom(8).hex()
            with self.lock:
                self.uploads[name] = self._metadata(), {}
            self._answer_xml("InitiateMultipartUploadResult", f"<UploadId>{name}</UploadId>")
            return
        with self.lock:
            metadata, parts = self.uploads.pop(query["uploadId"][0])
        stored = self._keep(path, b"".join(parts[number] for number in sorted(parts)), metadata)
        self._answer_xml("CompleteMultipartUploadResult", f"<ETag>{stored.etag}</ETag>")

    def do_DELETE(self) -> None:
        """Drop an object or an upload."""
        path, query = self._target()
        with self.lock:
            if "uploadId" in query:
                self.uploads.pop(query["uploadId"][0], None)
            else:
                self.objects.pop(path, None)
        self._answer(204, {})

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _give(self, *, with_body: bool) -> None:
        with self.lock:
            found = self.objects.get(self._target()[0])
        if found is None:
            self._answer(404, {})
            return
        size = len(found.data)
        headers = {"ETag": found.etag, "Last-Modified": found.modified, "Accept-Ranges": "bytes", **found.metadata}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            self._answer(200, headers, found.data, with_body=with_body)
            return
        first, last = int(span[1]), min(int(span[2] or size - 1), size - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._answer(206, headers, found.data[first : last + 1], with_body=with_body)

    def _keep(self, path: str, body: bytes, metadata: dict[str, str]) -> Stored:
        etag = f'"{hashlib.blake2b(os.urandom(16), digest_size=16).hexdigest()}"'
        stored = Stored(memoryview(body), metadata, etag, formatdate(usegmt=True))
        with self.lock:
            self.objects[path] = stored
        return stored

    def _target(self) -> tuple[str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        return parts.path, parse_qs(parts.query, keep_blank_values=True)

    def _metadata(self) -> dict[str, str]:
        return {name: value for name, value in self.headers.items() if name.lower().startswith(MEANT_FOR_USERS)}

    def _answer_xml(self, name: str, inner: str) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?><{name}><Bucket>b</Bucket><Key>k</Key>{inner}</{name}>'
        self._answer(200, {"Content-Type": "application/xml"}, memoryview(text.encode()))

    def _answer(
        self, status: int, headers: dict[str, str], body: memoryview | bytes = b"", *, with_body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body and len(body):
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """On a free port of loopback."""

    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    """Serve until killed, or until whoever started this has gone: its end of the standard input closes then."""
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
