"""The base of backends that wrap another backend and change how it behaves, as ``faulty`` does."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from xferd.plugins.base import Backend

if TYPE_CHECKING:
    from pydantic import BaseModel

    from xferd.plugins.base import Extent, LegScope, OpenLeg, SlotClass, Space, SpaceKind


class BackendDecorator(Backend):
    """Forwards what it does not change to ``inner``.

    The registry constructs it with its own options and the inner backend. Where the inner one is configured under
    its own name too, both share one instance, and the decorator neither starts nor closes it (``owns_inner`` False).
    """

    def __init__(self, options: BaseModel, inner: Backend, *, owns_inner: bool) -> None:
        self.inner = inner
        self._owns_inner = owns_inner
        self.is_restartable = inner.is_restartable  # type: ignore[misc]  # a constant, here of the instance
        self.is_transactional = inner.is_transactional  # type: ignore[misc]  # as above

    @classmethod
    @abc.abstractmethod
    def wraps(cls, options: BaseModel) -> str:
        """Return the name of the backend that is to be wrapped."""

    async def start(self) -> None:
        """Start the inner backend if it is ours."""
        if self._owns_inner:
            await self.inner.start()

    async def aclose(self) -> None:
        """Close the inner backend if it is ours."""
        if self._owns_inner:
            await self.inner.aclose()

    def pairs(self) -> frozenset[tuple[SpaceKind, SpaceKind]]:
        """Return the inner backend's pairs."""
        return self.inner.pairs()

    def refusal(self, source: Space, target: Space) -> str:
        """Return the inner backend's refusal."""
        return self.inner.refusal(source, target)

    def manner(self, source: Space, target: Space) -> str:
        """Return the inner backend's manner."""
        return self.inner.manner(source, target)

    def arrange(self, source: Extent, target: Extent) -> tuple[Extent, Extent]:
        """Return what the inner backend makes of a leg."""
        return self.inner.arrange(source, target)

    def chunk_limits(self, source: Space, target: Space) -> tuple[int, int] | None:
        """Return the inner backend's limits."""
        return self.inner.chunk_limits(source, target)

    def can_flush(self) -> bool:
        """Return what the inner backend says."""
        return self.inner.can_flush()

    def needs_leg(self, target: Space, *, durable: bool) -> bool:
        """Return what the inner backend says."""
        return self.inner.needs_leg(target, durable=durable)

    async def open_leg(self, scope: LegScope) -> OpenLeg:
        """Open the inner backend's leg, which this does not change: its chunks go past ``move``."""
        return await self.inner.open_leg(scope)

    def estimate_s(self, source: Space, target: Space, nbytes: int, pieces: int) -> float:
        """Return the inner backend's estimate."""
        return self.inner.estimate_s(source, target, nbytes, pieces)

    def slots(self, source: Space, target: Space) -> int:
        """Return the inner backend's slots."""
        return self.inner.slots(source, target)

    def slot_class(self, source: Space, target: Space, nbytes: int, pieces: int) -> SlotClass:
        """Return the inner backend's slot class."""
        return self.inner.slot_class(source, target, nbytes, pieces)
