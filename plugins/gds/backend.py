"""Files to GPU memory and back, without staging memory of the daemon, by the workers of the ``cuda`` backend.

kvikio needs libcuda even for host memory, so it runs where a CUDA context is: in device workers. Where the machine has
GPUDirect Storage the bytes go from the disk to the GPU; where not, kvikio goes through host memory of its own, which
``explain`` says plainly. Without kvikio this backend refuses, and files reach GPU memory by ``posix`` and ``cuda``
through staging memory, as they do without this backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from xferd.api.errors import ConfigError, Unsupported
from xferd.plugins.base import FileSpace, SlotClass, SpaceKind
from xferd.plugins.cuda.backend import CudaBackend, device_of
from xferd.plugins.decorator import BackendDecorator
from xferd.plugins.flushing import FlushedLeg
from xferd.plugins.movers import MoveCounter, MoverPool
from xferd.plugins.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel

    from xferd.plugins.base import Backend, BackendStatistics, Begun, Chunk, LegScope, OpenLeg, Space
    from xferd.plugins.cuda.control import Ready

# Guesses: a call of kvikio for each piece, and an NVMe disk. The engine learns better ones.
_START_S = 300e-6
_PIECE_S = 20e-6
_NBYTES_PER_S = 5e9

_PAIRS = frozenset({(SpaceKind.FILE, SpaceKind.DEVICE), (SpaceKind.DEVICE, SpaceKind.FILE)})


class GdsOptions(Options):
    """``[backends.gds]``: ``slots`` is the number of chunks under way at once."""

    slots: Annotated[int, Field(strict=True, ge=1, le=64)] = 4


class GdsBackend(BackendDecorator):
    """Sends chunks between files and GPUs to the workers of ``cuda``, which it shares."""

    name: ClassVar[str] = "gds"
    options: ClassVar[type[GdsOptions]] = GdsOptions

    def __init__(self, options: GdsOptions, inner: Backend, *, owns_inner: bool) -> None:
        super().__init__(options, inner, owns_inner=owns_inner)
        if not isinstance(inner, CudaBackend):
            raise ConfigError(f"gds wraps {inner.name!r}", limit="cuda", remedy="repair the registry")
        self.cuda = inner
        self._slots = options.slots
        self._counter = MoveCounter()
        self._flushers = MoverPool(self.name, 1)
        inner.manager.with_files = True

    @classmethod
    def wraps(cls, options: BaseModel) -> str:
        """Return "cuda": its workers, and its registry of memory."""
        del options
        return CudaBackend.name

    async def aclose(self) -> None:
        """End the thread that flushes files; ``cuda`` is closed by who owns it."""
        await self._flushers.aclose()
        await super().aclose()

    def pairs(self) -> frozenset[tuple[SpaceKind, SpaceKind]]:
        """Return FILE with DEVICE in both directions."""
        return _PAIRS

    def refusal(self, source: Space, target: Space) -> str:
        """Return why not; also where the workers have no library for it."""
        if (source.kind, target.kind) not in _PAIRS:
            return f"cannot move {source.kind.value} to {target.kind.value}"
        device = device_of(source, target)
        reason = self.cuda.manager.refusal(device)
        if reason:
            return f"GPU {device}: {reason}"
        ready = self._ready(device)
        return "" if ready is not None and ready.file_manner else _why_not(ready)

    def manner(self, source: Space, target: Space) -> str:
        """Say which way the bytes go: past host memory, or through it."""
        ready = self._ready(device_of(source, target))
        return "" if ready is None else ready.file_manner

    def estimate_s(self, source: Space, target: Space, nbytes: int, pieces: int) -> float:
        """Return a guess; the engine learns better ones."""
        return _START_S + pieces * _PIECE_S + nbytes / _NBYTES_PER_S

    def slots(self, source: Space, target: Space) -> int:
        """Return how many chunks at once."""
        return self._slots

    def slot_class(self, source: Space, target: Space, nbytes: int, pieces: int) -> SlotClass:
        """Return one class for all."""
        return SlotClass("", self._slots)

    def can_flush(self) -> bool:
        """It can: the file is open in this process too."""
        return True

    def needs_leg(self, target: Space, *, durable: bool) -> bool:
        """Return whether a file is written that must be on the disk at the end."""
        return durable

    async def open_leg(self, scope: LegScope) -> OpenLeg:
        """Begin a leg whose file is put on the disk once, at its end, from here: no worker is kept from its work."""
        assert scope.target is not None, "only legs that end in a file are opened"
        assert isinstance(scope.target.space, FileSpace)
        return FlushedLeg(self.move, self._flushers, scope.target.space)

    async def move(self, chunk: Chunk) -> int:
        """Move one chunk; the promises are those of ``cuda``.

        Fewer bytes than the chunk has were moved where the file ends before it does.

        Raises:
            Unsupported: the transfer has events, of which the library knows nothing; staging memory is their way.
        """
        if chunk.wait_event or chunk.done_event:
            raise Unsupported("events with GPUDirect Storage", remedy="leave the route to the planner")
        with self._counter.moving(chunk.nbytes):
            return await self.cuda.move(chunk)

    def begin(self, chunk: Chunk, done: Callable[[int | Exception], None]) -> Begun | None:
        """Leave it to ``move``: what a file takes is long beside a task."""
        return None

    def statistics(self) -> BackendStatistics:
        """Return counters since start; the bytes count at ``cuda``, whose workers move them, too."""
        return self._counter.snapshot(self._slots)

    def _ready(self, device: int) -> Ready | None:
        return self.cuda.manager.ready.get(device)


def _why_not(ready: Ready | None) -> str:
    return "no device worker has started" if ready is None else ready.file_refusal or "the workers were not asked"
