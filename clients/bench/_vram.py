"""Memory of a GPU for the benchmark: of cupy or torch where there is one, of a simulated GPU elsewhere.

A process stamps and looks at a copy in memory of the host, which is brought there and back outside of what is timed.
"""

from __future__ import annotations

import ctypes
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from xferd.api.errors import Unsupported
from xferd.api.types import Access
from xferd.clients._cuda import LIBRARY
from xferd.clients._device_driver import CUDA, SIMULATED
from xferd.clients.bench._owned import Owned
from xferd.clients.devices import SimulatedBuffer

if TYPE_CHECKING:
    from xferd.clients.memory import ByteArray
    from xferd.clients.sync import Client


def has_driver() -> bool:
    """Say whether CUDA's driver is on this machine; it is not initialised."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


def device_settings() -> list[str]:
    """Return what the daemons of a run need to use GPUs, or simulated ones; the command line may say otherwise."""
    return [f"backends.cuda.driver={CUDA if has_driver() else SIMULATED}"]


def make_vram(client: Client, nbytes: int) -> Owned:
    """Register memory of the first GPU of the daemon that works.

    Raises:
        Unsupported: it has none, or there is no library here to allocate by.
    """
    devices = client.devices()
    usable = next((info for info in devices if not info.reason), None)
    if usable is None:
        raise Unsupported(
            f"no GPU of the daemon works: {'; '.join(info.reason for info in devices) or 'it has none'}",
            remedy="see xferctl devices",
        )
    if usable.driver == SIMULATED:
        simulated = SimulatedBuffer(nbytes, usable.index)
        return Owned(_registered(client, simulated), simulated.array)
    assert usable.driver == CUDA
    buffer = DeviceBuffer(nbytes)
    return Owned(_registered(client, buffer.array), buffer.copy, push=buffer.push, pull=buffer.pull)


def _registered(client: Client, array: object) -> Any:
    return client.register_device(array, access=Access.READ_WRITE, label="bench")


class DeviceBuffer:
    """Memory of the current GPU, and a copy of it in memory of the host that the driver has locked.

    Attributes:
        array: of cupy or torch.
        copy: what ``push`` brings there and ``pull`` back.
    """

    def __init__(self, nbytes: int) -> None:
        """Allocate.

        Raises:
            Unsupported: neither cupy nor torch is installed.
        """
        library = next((name for name in ("cupy", "torch") if find_spec(name)), "")
        if not library:
            raise Unsupported("memory of a GPU needs cupy or torch", remedy="pip install cupy-cuda13x")
        self._library: Any = import_module(library)
        self._is_torch = library == "torch"
        if self._is_torch:
            self.array: Any = self._library.zeros(nbytes, dtype=self._library.uint8, device="cuda")
            self._locked: Any = self._library.zeros(nbytes, dtype=self._library.uint8, pin_memory=True)
            self.copy: ByteArray = self._locked.numpy()
        else:
            self.array = self._library.zeros(nbytes, dtype=np.uint8)
            self._locked = self._library.cuda.alloc_pinned_memory(nbytes)
            self.copy = np.frombuffer(self._locked, np.uint8, nbytes)
        self._finish()

    def push(self) -> None:
        """Bring the copy to the GPU."""
        if self._is_torch:
            self.array.copy_(self._locked)
        else:
            self.array.set(self.copy)
        self._finish()

    def pull(self) -> None:
        """Bring what is on the GPU into the copy."""
        if self._is_torch:
            self._locked.copy_(self.array)
        else:
            self.array.get(out=self.copy)
        self._finish()

    def _finish(self) -> None:
        if self._is_torch:
            self._library.cuda.synchronize()
        else:
            self._library.cuda.get_current_stream().synchronize()
