"""The same calls through gRPC and through REST, without the client library, which would refuse some of them itself.

Answers are plain documents in the shape of REST; refusals are ``Refused``. ``refuses`` is what most tests need: it
holds an error against the one table of codes and statuses, and against what its text must name.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import grpc
import pytest
from google.protobuf.json_format import MessageToDict

from xferd.api.errors import ERROR_TABLE, XferdError
from xferd.api.proto import xferd_v1_pb2 as pb, xferd_v1_pb2_grpc as stubs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cluster import DaemonProcess

DEADLINE_S = 30.0


class Refused(Exception):
    """What a face answered instead of what was asked for."""

    def __init__(self, status: str | int, detail: dict[str, Any]) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.code: str = detail.get("code", "")
        self.message: str = detail.get("message", detail.get("detail", ""))
        self.limit: str = detail.get("limit", "")
        self.remedy: str = detail.get("remedy", "")

    @property
    def text(self) -> str:
        return " | ".join((self.message, self.limit, self.remedy))


@contextlib.contextmanager
def refuses(error: type[XferdError], *names: object, limit: str | None = None) -> Iterator[list[Refused]]:
    """The block is refused with this error, whose text names all of ``names``, its limit, and a remedy."""
    seen: list[Refused] = []
    with pytest.raises(Refused) as caught:
        yield seen
    refused = caught.value
    seen.append(refused)
    assert refused.code == error.code, refused
    assert refused.status in (ERROR_TABLE[error].grpc, ERROR_TABLE[error].http), refused
    for name in names:
        assert str(name) in refused.text, (name, refused)
    if limit is not None:
        assert limit in refused.limit, refused
    assert refused.remedy, refused


@dataclass(frozen=True)
class Rows:
    """A list in columns, exactly as given: not checked, not completed."""

    region: Sequence[int]
    offset: Sequence[int]
    nbytes: Sequence[int]
    node: str = ""
    epoch: int = 0


@dataclass(frozen=True)
class Strides:
    """One run."""

    region: int
    offset: int
    nbytes: int
    stride: int
    count: int


@dataclass(frozen=True)
class Handle:
    """Rows of a prepared list."""

    handle: int
    index: Sequence[int] = ()


Spec = Rows | Strides | Handle


def row(region: int, offset: int, nbytes: int, node: str = "", epoch: int = 0) -> Rows:
    return Rows([region], [offset], [nbytes], node, epoch)


class Face(Protocol):
    """A session through one of the faces. ``call`` style verbs answer documents and raise ``Refused``."""

    kind: str
    session: str

    def allocate(self, *nbytes: int, pool: str = "", access: str = "NONE", label: str = "") -> list[int]: ...
    def register_file(self, path: str, **options: Any) -> int: ...
    def register_private(self, address: int, nbytes: int) -> int: ...
    def free(self, region: int) -> None: ...
    def region(self, region: int) -> dict[str, Any]: ...
    def regions(self, node: str) -> list[dict[str, Any]]: ...
    def read(self, region: int, offset: int, nbytes: int) -> bytes: ...
    def write(self, region: int, offset: int, data: bytes) -> None: ...
    def prepare(self, spec: Spec) -> int: ...
    def release_prepared(self, handle: int) -> None: ...
    def submit(self, op: str, local: Spec, remote: Spec, *, wait_s: float = 10.0, **options: Any) -> dict[str, Any]: ...
    def explain(self, op: str, local: Spec, remote: Spec, **options: Any) -> dict[str, Any]: ...
    def poll(self, transfer: str) -> dict[str, Any]: ...
    def post(self, transfer: str) -> dict[str, Any]: ...
    def cancel(self, transfer: str) -> dict[str, Any]: ...
    def release(self, transfer: str) -> None: ...
    def notify(self, target: str, payload: bytes = b"") -> None: ...
    def node(self, name: str) -> dict[str, Any]: ...
    def invalidate(self, name: str) -> None: ...
    def import_metadata(self, blob: bytes) -> None: ...
    def end_session(self, session: str) -> None: ...
    def close(self) -> None: ...


# ------------------------------------------------------------------------------------------- gRPC


def pack(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def message_of(spec: Spec) -> pb.DescriptorList:
    match spec:
        case Rows():
            columns = pb.Columns(region=pack(spec.region), offset=pack(spec.offset), nbytes=pack(spec.nbytes))
            return pb.DescriptorList(node=spec.node, epoch=spec.epoch, columns=columns)
        case Strides():
            run = pb.Run(
                region=spec.region, offset=spec.offset, nbytes=spec.nbytes, stride=spec.stride, count=spec.count
            )
            return pb.DescriptorList(strided=pb.Strided(runs=[run]))
        case Handle():
            index = struct.pack(f"<{len(spec.index)}I", *spec.index)
            return pb.DescriptorList(prepared=pb.PreparedRef(handle=spec.handle, index=index))


def refused(error: grpc.RpcError) -> Refused:
    trailers = dict(error.trailing_metadata() or ())
    raw = trailers.get("xferd-error-bin")
    detail = MessageToDict(pb.ErrorDetail.FromString(raw)) if raw else {"message": error.details()}
    return Refused(error.code().name, detail)


class GrpcFace:
    """A session opened by the stream of ``SessionService.Open``."""

    kind = "grpc"

    def __init__(self, daemon: DaemonProcess, agent: str = "") -> None:
        self.channel = grpc.insecure_channel(
            f"unix:{daemon.grpc_socket}",
            options=[("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)],
        )
        self.memory = stubs.MemoryServiceStub(self.channel)
        self.transfers = stubs.TransferServiceStub(self.channel)
        self.metadata = stubs.MetadataServiceStub(self.channel)
        self.notifications = stubs.NotificationServiceStub(self.channel)
        self.admin = stubs.AdminServiceStub(self.channel)
        self.sessions = stubs.SessionServiceStub(self.channel)
        try:
            self.stream = self.sessions.Open(pb.OpenSessionRequest(agent=agent))
            self.grant = next(self.stream).opened
        except grpc.RpcError as exc:
            self.channel.close()
            raise refused(exc) from exc
        self.session = self.grant.session_id
        self.auth = (("authorization", f"Bearer {self.grant.token}"),)

    def ask(self, method: Any, request: Any) -> Any:
        try:
            return method(request, metadata=self.auth, timeout=DEADLINE_S)
        except grpc.RpcError as exc:
            raise refused(exc) from exc

    def allocate(self, *nbytes: int, pool: str = "", access: str = "NONE", label: str = "") -> list[int]:
        request = pb.AllocateRequest(pool=pool, nbytes=nbytes, access=f"ACCESS_{access}", label=label)
        return [region.id for region in self.ask(self.memory.Allocate, request).regions]

    def register_file(self, path: str, *, access: str = "NONE", **options: Any) -> int:
        request = pb.RegisterFileRequest(path=path, access=f"ACCESS_{access}", **options)
        return int(self.ask(self.memory.RegisterFile, request).id)

    def register_private(self, address: int, nbytes: int) -> int:
        request = pb.RegisterPrivateRequest(address=address, nbytes=nbytes)
        return int(self.ask(self.memory.RegisterPrivate, request).id)

    def free(self, region: int) -> None:
        self.ask(self.memory.Free, pb.FreeRequest(region=[region]))

    def region(self, region: int) -> dict[str, Any]:
        (found,) = self.ask(self.memory.ListRegions, pb.ListRegionsRequest(region=[region])).regions
        return MessageToDict(found, preserving_proto_field_name=True)

    def regions(self, node: str) -> list[dict[str, Any]]:
        found = self.ask(self.memory.ListRegions, pb.ListRegionsRequest(node=node)).regions
        return [MessageToDict(region, preserving_proto_field_name=True) for region in found]

    def read(self, region: int, offset: int, nbytes: int) -> bytes:
        try:
            stream = self.memory.Read(
                pb.ReadRegionRequest(region=region, offset=offset, nbytes=nbytes),
                metadata=self.auth,
                timeout=DEADLINE_S,
            )
            return b"".join(part.data for part in stream)
        except grpc.RpcError as exc:
            raise refused(exc) from exc

    def write(self, region: int, offset: int, data: bytes) -> None:
        self.ask(self.memory.Write, iter([pb.WriteRegionRequest(region=region, offset=offset, data=data)]))

    def prepare(self, spec: Spec) -> int:
        return int(self.ask(self.transfers.Prepare, pb.PrepareRequest(list=message_of(spec))).handle)

    def release_prepared(self, handle: int) -> None:
        self.ask(self.transfers.ReleasePrepared, pb.ReleasePreparedRequest(handle=[handle]))

    def submit(self, op: str, local: Spec, remote: Spec, *, wait_s: float = 10.0, **options: Any) -> dict[str, Any]:
        return self._status(self.ask(self.transfers.Submit, self._request(op, local, remote, options, wait_s=wait_s)))

    def explain(self, op: str, local: Spec, remote: Spec, **options: Any) -> dict[str, Any]:
        answer = self.ask(self.transfers.Explain, self._request(op, local, remote, options))
        return MessageToDict(answer, preserving_proto_field_name=True)

    def _request(self, op: str, local: Spec, remote: Spec, options: dict[str, Any], **more: Any) -> pb.SubmitRequest:
        return pb.SubmitRequest(
            op=f"TRANSFER_OP_{op}", local=message_of(local), remote=message_of(remote), **options, **more
        )

    @staticmethod
    def _status(message: pb.TransferStatus) -> dict[str, Any]:
        document = MessageToDict(message, preserving_proto_field_name=True)
        document["state"] = document["state"].removeprefix("TRANSFER_STATE_")
        document["telemetry"] |= {"moved_nbytes": message.telemetry.moved_nbytes}
        return document

    def poll(self, transfer: str) -> dict[str, Any]:
        return self._status(self.ask(self.transfers.Poll, pb.PollRequest(id=[transfer])).transfers[0])

    def post(self, transfer: str) -> dict[str, Any]:
        return self._status(self.ask(self.transfers.Post, pb.PostRequest(id=transfer)))

    def cancel(self, transfer: str) -> dict[str, Any]:
        return self._status(self.ask(self.transfers.Cancel, pb.CancelRequest(id=[transfer])).transfers[0])

    def release(self, transfer: str) -> None:
        self.ask(self.transfers.Release, pb.ReleaseRequest(id=[transfer]))

    def notify(self, target: str, payload: bytes = b"") -> None:
        self.ask(self.notifications.Send, pb.Notification(target=target, payload=payload))

    def node(self, name: str) -> dict[str, Any]:
        return MessageToDict(self.ask(self.metadata.GetNode, pb.GetNodeRequest(name=name)))

    def invalidate(self, name: str) -> None:
        self.ask(self.metadata.Invalidate, pb.InvalidateRequest(name=name))

    def import_metadata(self, blob: bytes) -> None:
        self.ask(self.metadata.Import, pb.MetadataBlob(data=blob))

    def end_session(self, session: str) -> None:
        self.ask(self.admin.EndSession, pb.EndSessionRequest(id=session))

    def close(self) -> None:
        with contextlib.suppress(Refused, ValueError):  # its daemon may have been killed, or it was closed before
            self.ask(self.sessions.Close, pb.CloseSessionRequest())
        self.stream.cancel()
        self.channel.close()


# ------------------------------------------------------------------------------------------- REST


def document_of(spec: Spec) -> dict[str, Any]:
    match spec:
        case Rows():
            columns = {"region": list(spec.region), "offset": list(spec.offset), "nbytes": list(spec.nbytes)}
            return {"node": spec.node, "epoch": spec.epoch, "columns": columns}
        case Strides():
            run = {name: getattr(spec, name) for name in ("region", "offset", "nbytes", "stride", "count")}
            return {"runs": [run]}
        case Handle():
            return {"prepared": spec.handle} | ({"index": list(spec.index)} if spec.index else {})


class RestFace:
    """A session opened by ``POST /v1/sessions``."""

    kind = "rest"

    def __init__(self, daemon: DaemonProcess, agent: str = "") -> None:
        self.daemon = daemon
        self.token = ""
        grant = self.ask("POST", "/v1/sessions", {"agent": agent, "ttl_s": 600})
        self.session: str = grant["session"]
        self.token = grant["token"]

    def ask(self, method: str, path: str, body: Any = None, *, raw: bytes | None = None, admin: bool = False) -> Any:
        status, answer = request(self.daemon, method, path, body, raw=raw, token="" if admin else self.token)
        if status >= 400:
            raise Refused(status, answer)
        return answer

    def allocate(self, *nbytes: int, pool: str = "", access: str = "NONE", label: str = "") -> list[int]:
        body = {"kind": "allocate", "nbytes": list(nbytes), "pool": pool, "access": access, "label": label}
        return [int(region["id"]) for region in self.ask("POST", "/v1/regions", body)["regions"]]

    def register_file(self, path: str, **options: Any) -> int:
        return int(self.ask("POST", "/v1/regions", {"kind": "file", "path": path, **options})["regions"][0]["id"])

    def register_private(self, address: int, nbytes: int) -> int:
        body = {"kind": "private", "address": address, "nbytes": nbytes}
        return int(self.ask("POST", "/v1/regions", body)["regions"][0]["id"])

    def free(self, region: int) -> None:
        self.ask("DELETE", f"/v1/regions/{region}")

    def region(self, region: int) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/v1/regions/{region}")
        return found

    def regions(self, node: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("GET", f"/v1/nodes/{node}/regions")["regions"]
        return found

    def read(self, region: int, offset: int, nbytes: int) -> bytes:
        data: bytes = self.ask("GET", f"/v1/regions/{region}/bytes?offset={offset}&nbytes={nbytes}")
        return data

    def write(self, region: int, offset: int, data: bytes) -> None:
        self.ask("PUT", f"/v1/regions/{region}/bytes?offset={offset}", raw=data)

    def prepare(self, spec: Spec) -> int:
        return int(self.ask("POST", "/v1/prepared", document_of(spec))["handle"])

    def release_prepared(self, handle: int) -> None:
        self.ask("DELETE", f"/v1/prepared/{handle}")

    def submit(self, op: str, local: Spec, remote: Spec, *, wait_s: float = 10.0, **options: Any) -> dict[str, Any]:
        document = self._request(op, local, remote, options)
        status: dict[str, Any] = self.ask("POST", "/v1/transfers", document | {"wait_s": wait_s})
        return status

    def explain(self, op: str, local: Spec, remote: Spec, **options: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.ask("POST", "/v1/transfers/explain", self._request(op, local, remote, options))
        return answer

    def _request(self, op: str, local: Spec, remote: Spec, options: dict[str, Any]) -> dict[str, Any]:
        return {"op": op, "local": document_of(local), "remote": document_of(remote)} | options

    def poll(self, transfer: str) -> dict[str, Any]:
        status: dict[str, Any] = self.ask("GET", f"/v1/transfers/{transfer}")
        return status

    def post(self, transfer: str) -> dict[str, Any]:
        status: dict[str, Any] = self.ask("POST", f"/v1/transfers/{transfer}/post")
        return status

    def cancel(self, transfer: str) -> dict[str, Any]:
        status: dict[str, Any] = self.ask("POST", f"/v1/transfers/{transfer}/cancel")
        return status

    def release(self, transfer: str) -> None:
        self.ask("DELETE", f"/v1/transfers/{transfer}")

    def notify(self, target: str, payload: bytes = b"") -> None:
        self.ask("POST", "/v1/notifications", {"target": target, "payload": base64.b64encode(payload).decode()})

    def node(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/v1/nodes/{quote(name)}")
        return found

    def invalidate(self, name: str) -> None:
        self.ask("DELETE", f"/v1/metadata/{quote(name)}")

    def import_metadata(self, blob: bytes) -> None:
        self.ask("PUT", "/v1/metadata/import", raw=blob)

    def end_session(self, session: str) -> None:
        self.ask("DELETE", f"/v1/sessions/{session}", admin=True)

    def close(self) -> None:
        with contextlib.suppress(Refused, OSError):  # its daemon may have been killed
            self.ask("DELETE", f"/v1/sessions/{self.session}")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("xferd", timeout=DEADLINE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def request(
    daemon: DaemonProcess, method: str, path: str, body: Any = None, *, raw: bytes | None = None, token: str = ""
) -> tuple[int, Any]:
    """Ask the REST face; ``raw`` is sent as octets. Returns the status, and a document or bytes."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if body is not None:
        raw, headers["Content-Type"] = (
            body if isinstance(body, bytes) else json.dumps(body).encode(),
            "application/json",
        )
    elif raw is not None:
        headers["Content-Type"] = "application/octet-stream"
    with contextlib.closing(_UnixConnection(str(daemon.admin_socket))) as connection:
        with contextlib.suppress(BrokenPipeError):  # refused before all of it was read: the answer is there
            connection.request(method, path, raw, headers)
        answer = connection.getresponse()
        data = answer.read()
        is_document = "json" in answer.headers.get("Content-Type", "")
        return answer.status, json.loads(data) if is_document else data


FACES: dict[str, type[GrpcFace | RestFace]] = {"grpc": GrpcFace, "rest": RestFace}
