"""UCX's C interface through ctypes: finding the library, its structures, its calls, its errors.

Why not ucxx, its Python package: a UCX scatter list (``ucp_dt_iov_t``) is a table of (address, nbytes), which is what
this daemon moves already, so that one call sends a thousand blocks without a loop and without a copy; ucxx has no
scatter lists, and takes a coroutine for each block. And RDMA is in neither: the UCX that ucxx brings from PyPI is built
``--without-verbs``. Fabrics need the system's UCX, which here is found first, and ucxx can only be told to use by an
environment variable. ``docs/ucx.md`` has what was measured of both.

The structures are those of API 1.13, which Debian 12 has. UCX keeps them compatible by ``field_mask``: later versions
only append.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_int8, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xferd.api.errors import ConfigError, Unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping

API_VERSION = (1, 13)
SONAME = "libucp.so.0"
REMEDY = "install UCX of your system or fabric (libucx0), or pip install 'xferd[ucx]', or set backends.ucx.library"

OK, IN_PROGRESS = 0, 1
ERR_BUSY, ERR_CANCELED, ERR_MESSAGE_TRUNCATED = -15, -16, -9
ERR_UNREACHABLE, ERR_REJECTED, ERR_NOT_CONNECTED, ERR_CONNECTION_RESET, ERR_ENDPOINT_TIMEOUT = -6, -23, -24, -25, -80
LOST = frozenset({ERR_UNREACHABLE, ERR_REJECTED, ERR_NOT_CONNECTED, ERR_CONNECTION_RESET, ERR_ENDPOINT_TIMEOUT})
"""Statuses of a message that say that its endpoint is gone; UCX may tell them before it tells the endpoint's."""

FEATURE_TAG, FEATURE_WAKEUP = 1 << 0, 1 << 4
THREAD_MODE_SERIALIZED = 1
EP_REMOTE_ADDRESS, EP_ERR_MODE, EP_ERR_HANDLER = 1 << 0, 1 << 1, 1 << 2
ERR_MODE_PEER = 1
EP_CLOSE_FORCE = 1 << 0
OP_DATATYPE, OP_FLAGS, OP_NO_IMMEDIATE = 1 << 3, 1 << 4, 1 << 16
DATATYPE_BYTES, DATATYPE_IOV = 1 << 3, 2
FULL_MASK = (1 << 64) - 1

SHARED_MEMORY_SETTING = b"MM_ERROR_HANDLING"
"""Without it shared memory says that it cannot report a peer's death, and is not used by endpoints that want that."""

ErrorCallback = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int8)


class Params(ctypes.Structure):
    """``ucp_params_t``."""

    _fields_ = (
        ("field_mask", c_uint64),
        ("features", c_uint64),
        ("request_size", c_size_t),
        ("request_init", c_void_p),
        ("request_cleanup", c_void_p),
        ("tag_sender_mask", c_uint64),
        ("mt_workers_shared", c_int),
        ("estimated_num_eps", c_size_t),
        ("estimated_num_ppn", c_size_t),
        ("name", c_char_p),
    )


class WorkerParams(ctypes.Structure):
    """``ucp_worker_params_t``; the cpu mask is 1024 bits."""

    _fields_ = (
        ("field_mask", c_uint64),
        ("thread_mode", c_int),
        ("cpu_mask", ctypes.c_ubyte * 128),
        ("events", c_uint),
        ("user_data", c_void_p),
        ("event_fd", c_int),
        ("flags", c_uint64),
        ("name", c_char_p),
    )


class _SocketAddress(ctypes.Structure):
    _fields_ = (("addr", c_void_p), ("addrlen", c_uint32))


class EndpointParams(ctypes.Structure):
    """``ucp_ep_params_t``."""

    _fields_ = (
        ("field_mask", c_uint64),
        ("address", c_char_p),
        ("err_mode", c_int),
        ("err_callback", ErrorCallback),
        ("err_arg", c_void_p),
        ("user_data", c_void_p),
        ("flags", c_uint),
        ("sockaddr", _SocketAddress),
        ("conn_request", c_void_p),
        ("name", c_char_p),
        ("local_sockaddr", _SocketAddress),
    )


class RequestParam(ctypes.Structure):
    """``ucp_request_param_t``, and room for what later versions append."""

    _fields_ = (
        ("op_attr_mask", c_uint32),
        ("flags", c_uint32),
        ("request", c_void_p),
        ("callback", c_void_p),
        ("datatype", c_uint64),
        ("user_data", c_void_p),
        ("reply_buffer", c_void_p),
        ("memory_type", c_int),
        ("recv_info", c_void_p),
        ("memh", c_void_p),
        ("later", c_uint64 * 8),
    )


class TagInfo(ctypes.Structure):
    """``ucp_tag_recv_info_t``."""

    _fields_ = (("sender_tag", c_uint64), ("length", c_size_t))


_CALLS: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "ucp_get_version_string": (c_char_p, ()),
    "ucp_config_read": (c_int8, (c_char_p, c_char_p, POINTER(c_void_p))),
    "ucp_config_modify": (c_int8, (c_void_p, c_char_p, c_char_p)),
    "ucp_config_release": (None, (c_void_p,)),
    "ucp_init_version": (c_int8, (c_uint, c_uint, POINTER(Params), c_void_p, POINTER(c_void_p))),
    "ucp_cleanup": (None, (c_void_p,)),
    "ucp_worker_create": (c_int8, (c_void_p, POINTER(WorkerParams), POINTER(c_void_p))),
    "ucp_worker_destroy": (None, (c_void_p,)),
    "ucp_worker_get_address": (c_int8, (c_void_p, POINTER(c_void_p), POINTER(c_size_t))),
    "ucp_worker_release_address": (None, (c_void_p, c_void_p)),
    "ucp_worker_get_efd": (c_int8, (c_void_p, POINTER(c_int))),
    "ucp_worker_arm": (c_int8, (c_void_p,)),
    "ucp_worker_progress": (c_uint, (c_void_p,)),
    "ucp_ep_create": (c_int8, (c_void_p, POINTER(EndpointParams), POINTER(c_void_p))),
    "ucp_ep_close_nbx": (c_void_p, (c_void_p, POINTER(RequestParam))),
    "ucp_tag_send_nbx": (c_void_p, (c_void_p, c_void_p, c_size_t, c_uint64, POINTER(RequestParam))),
    "ucp_tag_recv_nbx": (c_void_p, (c_void_p, c_void_p, c_size_t, c_uint64, c_uint64, POINTER(RequestParam))),
    "ucp_request_cancel": (None, (c_void_p, c_void_p)),
}
_QUICK_CALLS: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "ucp_request_check_status": (c_int8, (c_void_p,)),
    "ucp_tag_recv_request_test": (c_int8, (c_void_p, POINTER(TagInfo))),
    "ucp_request_free": (None, (c_void_p,)),
}
"""They only look at memory, so that letting go of the interpreter's lock would cost more than they do."""


class Ucp:
    """The loaded library: its calls as attributes, with their C names without ``ucp_``."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        quick = ctypes.PyDLL(path)
        for library, calls in ((self._library, _CALLS), (quick, _QUICK_CALLS)):
            for name, (restype, argtypes) in calls.items():
                try:
                    call = getattr(library, name)
                except AttributeError:
                    raise Unsupported(f"{path} has no {name}: UCX is too old", limit="1.13", remedy=REMEDY) from None
                call.restype, call.argtypes = restype, argtypes
                setattr(self, name.removeprefix("ucp_"), call)
        # libucs is loaded with libucp, which links to it; a handle of libucp finds its symbols.
        self._describe = self._library.ucs_status_string
        self._describe.restype, self._describe.argtypes = c_char_p, (c_int8,)

    def __getattr__(self, name: str) -> Any:  # a seam to C, where every call is declared above
        raise AttributeError(name)

    @property
    def version(self) -> str:
        """Of the library, such as "1.22.0"."""
        return str(self.get_version_string().decode())

    def describe(self, status: int) -> str:
        """Return UCX's words for a status."""
        return str(self._describe(status).decode())

    def open_context(self, settings: Mapping[str, str]) -> c_void_p:
        """Return a context for tagged messages.

        Raises:
            ConfigError: UCX does not know a setting, or not its value.
            Unsupported: UCX finds nothing to work with.
        """
        config, context = c_void_p(), c_void_p()
        self._must(self.config_read(None, None, byref(config)), "read its configuration")
        try:
            self.config_modify(config, SHARED_MEMORY_SETTING, b"y")  # an older UCX has no such setting
            for key, value in settings.items():
                status = self.config_modify(config, key.encode(), value.encode())
                if status != OK:
                    raise ConfigError(
                        f"UCX {self.version} does not take {key} = {value!r}: {self.describe(status)}",
                        remedy="correct [backends.ucx]; `ucx_info -caf` lists the settings",
                    )
            params = Params(field_mask=1, features=FEATURE_TAG | FEATURE_WAKEUP)
            status = self.init_version(*API_VERSION, byref(params), config, byref(context))
        finally:
            self.config_release(config)
        self._must(status, "start")
        return context

    def open_worker(self, context: c_void_p) -> c_void_p:
        """Return a worker, for use by one thread at a time."""
        worker = c_void_p()
        params = WorkerParams(field_mask=1, thread_mode=THREAD_MODE_SERIALIZED)
        self._must(self.worker_create(context, byref(params), byref(worker)), "open its devices")
        return worker

    def address_of(self, worker: c_void_p) -> bytes:
        """Return a worker's address, which others connect to."""
        address, length = c_void_p(), c_size_t()
        self._must(self.worker_get_address(worker, byref(address), byref(length)), "tell its address")
        assert address.value is not None
        try:
            return ctypes.string_at(address.value, length.value)
        finally:
            self.worker_release_address(worker, address)

    def event_fd_of(self, worker: c_void_p) -> int:
        """Return the descriptor that becomes readable when an armed worker has something to do; the worker owns it."""
        fd = c_int()
        self._must(self.worker_get_efd(worker, byref(fd)), "wait for events")
        return fd.value

    def _must(self, status: int, what: str) -> None:
        if status != OK:
            raise Unsupported(
                f"UCX {self.version} cannot {what}: {self.describe(status)}",
                remedy="check backends.ucx.transports and devices; `ucx_info -d` lists what there is",
            )


def status_of(pointer: int | None) -> int:
    """Return the status in what a call returned: OK for null, an error, or IN_PROGRESS for a request's address."""
    if not pointer:
        return OK
    return pointer - (1 << 64) if pointer >= (1 << 64) - 100 else IN_PROGRESS


def load(path: str) -> Ucp:
    """Load UCX: from ``path``, or the system's, or else what the extra brought.

    Raises:
        Unsupported: there is none.
    """
    # Its own handlers of signals would write a backtrace and stop the process's way of dying.
    os.environ.setdefault("UCX_HANDLE_ERRORS", "none")
    tried = []
    for candidate in [path] if path else [SONAME, *_from_wheel()]:
        try:
            return Ucp(candidate)
        except OSError as exc:
            tried.append(str(exc))
    raise Unsupported(f"no UCX library: {'; '.join(tried)}", remedy=REMEDY)


def _from_wheel() -> list[str]:
    """Return where the package libucx has the library; it is not imported."""
    spec = find_spec("libucx")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    return [str(path) for place in places if (path := Path(place) / "lib" / SONAME).exists()]
