"""One process of a peer under measurement (NIXL, Mooncake): a target that owns memory, or an initiator that moves it.

Run as a script by ``_peers.py``, which is the only one that speaks to it. It imports nothing of xferd, so that the
peer's libraries find themselves alone in the process, with an environment of their own. Whatever fails ends the
process: the other side sees the connection close, and what was printed.

A message is a JSON object, then as many arrays as its ``arrays`` says, each a frame of its own. The initiator times
requests itself, in a loop that speaks to nobody, so that the way between the processes costs the figures nothing.
"""

from __future__ import annotations

import abc
import ctypes
import json
import mmap
import os
import signal
import sys
import time
from importlib import import_module
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

Rows: TypeAlias = NDArray[np.int64]
Timings: TypeAlias = NDArray[np.float64]
"""A row for each request: seconds to prepare it, then to post it, then until it was done."""

Moments: TypeAlias = tuple[float, float, float, float]
"""The clock when a request began, when it was prepared, when posted, and when its bytes had moved and it was let go."""


_PR_SET_PDEATHSIG = 1


class Work(NamedTuple):
    """What an initiator does in each request of a visit: blocks by number, on the near side and on the far side."""

    op: str
    block_nbytes: int
    prepared: str
    near: Rows
    far: Rows


def send(connection: Connection, message: dict[str, Any], *arrays: NDArray[Any]) -> None:
    """Send one message and its arrays."""
    connection.send_bytes(json.dumps(message | {"arrays": [array.dtype.str for array in arrays]}).encode())
    for array in arrays:
        connection.send_bytes(np.ascontiguousarray(array).tobytes())


def receive(connection: Connection) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """Wait for one message and its arrays, each flat; raises EOFError when the other side has gone."""
    message: dict[str, Any] = json.loads(connection.recv_bytes())
    return message, [np.frombuffer(connection.recv_bytes(), dtype) for dtype in message.pop("arrays")]


class Driver(abc.ABC):
    """A peer's library, given one span of memory in this process."""

    def __init__(self, address: int, nbytes: int, options: dict[str, Any]) -> None:
        self.address = address
        self.nbytes = nbytes
        self.options = options

    @abc.abstractmethod
    def invitation(self) -> dict[str, Any]:
        """Return what an initiator must know to reach this side's memory."""

    @abc.abstractmethod
    def connect(self, invitation: dict[str, Any]) -> None:
        """Get ready to reach the memory of the side that invites."""

    @abc.abstractmethod
    def begin(self, work: Work) -> Callable[[], Moments]:
        """Prepare as far as ``work.prepared`` says; returns what makes one request and waits for its end."""


class Nixl(Driver):
    """An agent with the backend UCX."""

    def __init__(self, address: int, nbytes: int, options: dict[str, Any]) -> None:
        super().__init__(address, nbytes, options)
        api = import_module(f"{options['module']}._api")
        config = api.nixl_agent_config(backends=["UCX"], **options["agent"])
        self._agent = api.nixl_agent(options["role"], config)
        self._kind = options.get("kind", "DRAM")
        self._agent.register_memory([(address, nbytes, 0, "")], self._kind)
        self._far_kind = "DRAM"
        self._held: list[Any] = []  # handles of this visit's work: released when the next begins
        self._peer, self._far_address, self._far_nbytes = "", 0, 0

    def invitation(self) -> dict[str, Any]:
        """Return the agent's metadata and where its memory is."""
        agent = self._agent.get_agent_metadata().hex()
        return {"address": self.address, "nbytes": self.nbytes, "kind": self._kind, "metadata": agent}

    def connect(self, invitation: dict[str, Any]) -> None:
        """Load the other agent's metadata, and connect before the first request does."""
        self._peer = _text(self._agent.add_remote_agent(bytes.fromhex(invitation["metadata"])))
        self._far_address, self._far_nbytes = invitation["address"], invitation["nbytes"]
        self._far_kind = invitation["kind"]
        self._agent.make_connection(self._peer)

    def begin(self, work: Work) -> Callable[[], Moments]:
        """Make a transfer, or prepared lists of all blocks, or nothing, for the requests to use."""
        for handle in self._held:
            handle.release()
        self._held.clear()
        if work.prepared == "transfer":
            self._held.append(handle := self._make(work))
            return lambda: self._post(handle)
        if work.prepared == "lists":
            return self._with_lists(work)
        return lambda: self._made_and_posted(lambda: self._make(work))

    def _with_lists(self, work: Work) -> Callable[[], Moments]:
        size = work.block_nbytes
        near = self._prepare("NIXL_INIT_AGENT", self._kind, self.address, self.nbytes, size)
        far = self._prepare(self._peer, self._far_kind, self._far_address, self._far_nbytes, size)
        self._held += [near, far]
        make = self._agent.make_prepped_xfer
        # The index arrays are part of the request, as they are with xferd; int32 is what NIXL takes without a copy.
        indices = work.near.astype(np.int32), work.far.astype(np.int32)
        return lambda: self._made_and_posted(lambda: make(work.op, near, indices[0], far, indices[1]))

    def _prepare(self, agent: str, kind: str, address: int, nbytes: int, block_nbytes: int) -> Any:
        """Prepare all blocks of one side; the strided form is the fastest to build."""
        every = np.array([[address, block_nbytes, 0, block_nbytes, nbytes // block_nbytes]], np.uint64)
        return self._agent.prep_xfer_dlist(agent, every, kind)

    def _make(self, work: Work) -> Any:
        """Build both lists from block numbers, and a transfer from them."""
        sides = [
            self._agent.get_xfer_descs(descriptors(address, rows, work.block_nbytes), kind)
            for kind, address, rows in (
                (self._kind, self.address, work.near),
                (self._far_kind, self._far_address, work.far),
            )
        ]
        return self._agent.initialize_xfer(work.op, *sides, self._peer)

    def _post(self, handle: Any) -> Moments:
        started = time.perf_counter()
        posted, done = self._until_done(handle)
        return started, started, posted, done

    def _made_and_posted(self, make: Callable[[], Any]) -> Moments:
        started = time.perf_counter()
        handle = make()
        prepared = time.perf_counter()
        posted, _ = self._until_done(handle)
        handle.release()
        return started, prepared, posted, time.perf_counter()

    def _until_done(self, handle: Any) -> tuple[float, float]:
        """Post and poll, which is the only way there is; returns the clock when it was posted and when it was done."""
        check = self._agent.check_xfer_state
        state = self._agent.transfer(handle)
        posted = time.perf_counter()
        while state == "PROC":
            state = check(handle)
        if state != "DONE":
            raise RuntimeError(f"a transfer ended as {state}")
        return posted, time.perf_counter()


class NixlPosix(Nixl):
    """An agent with the backend POSIX: what the target has mapped is a file, which the initiator opens and moves."""

    def __init__(self, address: int, nbytes: int, options: dict[str, Any]) -> None:
        Driver.__init__(self, address, nbytes, options)
        self._held = []
        self._fd = -1
        if options["role"] == "target":  # it lends the file, and does nothing
            return
        api = import_module(f"{options['module']}._api")
        self._agent = api.nixl_agent("files", api.nixl_agent_config(backends=[]))
        self._agent.create_backend("POSIX", options["backend"])
        self._agent.register_memory([(address, nbytes, 0, "")], "DRAM")

    def invitation(self) -> dict[str, Any]:
        """Return where the file can be opened."""
        return {"path": f"/proc/{os.getpid()}/fd/{self.options['memory_fd']}", "nbytes": self.nbytes}

    def connect(self, invitation: dict[str, Any]) -> None:
        """Open the file and register it."""
        self._fd = os.open(invitation["path"], os.O_RDWR)
        self._agent.register_memory([(0, invitation["nbytes"], self._fd, "")], "FILE")

    def _make(self, work: Work) -> Any:
        near = self._agent.get_xfer_descs(descriptors(self.address, work.near, work.block_nbytes), "DRAM")
        table = descriptors(0, work.far, work.block_nbytes)
        table[:, 2] = self._fd
        return self._agent.initialize_xfer(work.op, near, self._agent.get_xfer_descs(table, "FILE"), "files")


class Mooncake(Driver):
    """A transfer engine; it has no prepared lists, so that lists made once a visit are the most one can do."""

    def __init__(self, address: int, nbytes: int, options: dict[str, Any]) -> None:
        super().__init__(address, nbytes, options)
        self._engine = import_module("mooncake.engine").TransferEngine()
        _must(self._engine.initialize(options["host"], "P2PHANDSHAKE", options["protocol"], ""), "initialize")
        _must(self._engine.register_memory(address, nbytes), "register_memory")
        self._peer, self._far_address = "", 0

    def invitation(self) -> dict[str, Any]:
        """Return the name under which the engine listens, and where its memory is."""
        host = self.options["host"].rpartition(":")[0]
        return {"address": self.address, "segment": f"{host}:{self._engine.get_rpc_port()}"}

    def connect(self, invitation: dict[str, Any]) -> None:
        """Remember the other side: the engine connects with the first request."""
        self._peer, self._far_address = invitation["segment"], invitation["address"]

    def begin(self, work: Work) -> Callable[[], Moments]:
        """Take the call for the direction; lists are made now, or with each request."""
        engine = self._engine
        call = engine.batch_transfer_sync_write if work.op == "WRITE" else engine.batch_transfer_sync_read

        def lists() -> tuple[list[int], list[int], list[int]]:
            near = (self.address + work.near * work.block_nbytes).tolist()
            far = (self._far_address + work.far * work.block_nbytes).tolist()
            return near, far, [work.block_nbytes] * len(near)

        made = lists() if work.prepared == "transfer" else None

        def request() -> Moments:
            started = time.perf_counter()
            near, far, nbytes = made or lists()
            prepared = time.perf_counter()
            _must(call(self._peer, near, far, nbytes), "a transfer")
            return started, prepared, prepared, time.perf_counter()

        return request


class OnDevice:
    """Memory of a GPU, by cupy, of which the memory that the benchmark stamps and looks at is a copy."""

    def __init__(self, host: NDArray[np.uint8]) -> None:
        self._cupy: Any = import_module("cupy")
        self._host = host
        self._array: Any = self._cupy.zeros(len(host), np.uint8)
        self.address = int(self._array.data.ptr)

    def push(self) -> None:
        """Bring the copy to the GPU."""
        self._array.set(self._host)
        self._cupy.cuda.Device().synchronize()

    def pull(self) -> None:
        """Bring what is on the GPU into the copy."""
        self._array.get(out=self._host)
        self._cupy.cuda.Device().synchronize()


DRIVERS: dict[str, type[Driver]] = {"nixl": Nixl, "nixl-posix": NixlPosix, "mooncake": Mooncake}


def descriptors(address: int, rows: Rows, block_nbytes: int) -> NDArray[np.uint64]:
    """Return NIXL's form of a list, (address, bytes, device) a row, with no loop over rows."""
    table = np.zeros((len(rows), 3), np.uint64)
    table[:, 0] = address + rows.astype(np.uint64) * np.uint64(block_nbytes)
    table[:, 1] = block_nbytes
    return table


def timed(request: Callable[[], Moments], least: int, most: int, seconds: float) -> Timings:
    """Make requests until the time is over, but at least ``least`` and at most ``most``."""
    moments: list[Moments] = []
    until = time.perf_counter() + seconds
    while len(moments) < most and (len(moments) < least or moments[-1][-1] < until):
        moments.append(request())
    return np.diff(np.array(moments), axis=1)


def serve(connection: Connection, driver: Driver, device: OnDevice | None = None) -> None:
    """Answer until the other side closes the connection."""
    send(connection, driver.invitation())
    request: Callable[[], Moments] | None = None
    while True:
        try:
            message, arrays = receive(connection)
        except EOFError:
            return
        match message["verb"]:
            case "connect":
                driver.connect(message["invitation"])
                send(connection, {})
            case "begin":
                request = driver.begin(Work(message["op"], message["block_nbytes"], message["prepared"], *arrays))
                send(connection, {})
            case "push" | "pull" as verb:
                if device is not None:
                    getattr(device, verb)()
                send(connection, {})
            case "run":
                assert request is not None
                send(connection, {}, timed(request, message["least"], message["most"], message["seconds"]))


def main(arguments: list[str]) -> None:
    """Map the memory, load the peer's library, serve. Arguments: connection fd, memory fd, options in JSON."""
    # A stopped process would not see that the benchmark has gone, and its connection with it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(int(arguments[0]))
    memory_fd, options = int(arguments[1]), json.loads(arguments[2]) | {"memory_fd": int(arguments[1])}
    # Page tables are filled now, so that no request pays for them.
    memory = mmap.mmap(memory_fd, options["nbytes"], flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    host = np.frombuffer(memory, np.uint8)
    device = OnDevice(host) if options.get("kind") == "VRAM" else None
    address = host.ctypes.data if device is None else device.address
    serve(connection, DRIVERS[options["driver"]](address, options["nbytes"], options), device)


def _must(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what} ended with status {status}")


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name


def _print_and_leave(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, traceback)
    os._exit(1)


if __name__ == "__main__":
    # Always by _exit: the libraries' own threads would be joined otherwise, which may wait for ever, and what their
    # destructors do after a failure (a crash) would hide the failure.
    sys.excepthook = _print_and_leave
    main(sys.argv[1:])
    os._exit(0)
