"""A server that speaks S3, on a free loopback port, in a process of its own; and a look at it beside the backend."""

from __future__ import annotations

import contextlib
import http.client
import re
import subprocess
import sys
import time
import urllib.parse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ACCESS_KEY = "AKIAXFERDTESTONLY000"
SECRET_KEY = "s3cr3t-of-the-tests/not+for+real"

# moto's own server, told to take any free port and to say which: nothing can take it between the asking and the use.
_SERVER = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
app = DomainDispatcherApplication(create_backend_app)
server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


# The server looks at who signs, as an owner must be somebody, and not at the signature.
_AUTHORIZATION = (
    f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/20200101/us-east-1/s3/aws4_request, SignedHeaders=, Signature="
)


class S3Server:
    """The server's address, and requests to it beside the backend's."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.endpoint = f"http://127.0.0.1:{port}"

    def request(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
        """Make one request; raises AssertionError where the answer is no success."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {"Authorization": _AUTHORIZATION} | (headers or {}))
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        assert answer.status < 300, (method, path, answer.status, data[:300])
        return data

    def create_bucket(self, bucket: str) -> None:
        self.request("PUT", f"/{bucket}")

    def put(self, bucket: str, key: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.request("PUT", f"/{bucket}/{urllib.parse.quote(key)}", data, headers)

    def get(self, bucket: str, key: str) -> bytes:
        return self.request("GET", f"/{bucket}/{urllib.parse.quote(key)}")

    def keys(self, bucket: str) -> list[str]:
        text = self.request("GET", f"/{bucket}?list-type=2&encoding-type=url").decode()
        return [urllib.parse.unquote(key) for key in re.findall(r"<Key>([^<]*)</Key>", text)]

    def unfinished_uploads(self, bucket: str) -> int:
        return self.request("GET", f"/{bucket}?uploads").decode().count("<UploadId>")

    def store_section(self, bucket: str, **more: object) -> dict[str, object]:
        """Return a section of ``[backends.object.stores]`` for a bucket here."""
        section: dict[str, object] = {
            "url": f"s3://{bucket}",
            "endpoint": self.endpoint,
            "region": "us-east-1",
            "allow_http": True,
            "max_retries": 3,
            "retry_timeout": 5.0,
        }
        return section | more


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run a server; it is empty, and what it holds ends with it."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the server ended: {process.wait()}"
        server = S3Server(int(line))
        deadline = time.monotonic() + 30
        while True:
            try:
                server.request("GET", "/moto-api/data.json")
                break
            except OSError:
                assert time.monotonic() < deadline
        yield server
    finally:
        process.kill()
        process.communicate()


def write_credentials(path: str) -> None:
    """Write a shared credentials file, as the AWS tools read it."""
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(f"[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
