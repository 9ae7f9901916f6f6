"""What a backend has made of a pair of lists, kept for as long as both are: for transfers that are posted again.

Plans keep their lists, so the next post has the same two objects; from the second post on those of their chunks, too.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from xferd.plugins.base import Extent

T = TypeVar("T")


class ByPair(Generic[T]):
    """One value for a source and its last target. A value must not hold the source, or neither ever goes."""

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[Extent, tuple[weakref.ref[Extent], T]] = weakref.WeakKeyDictionary()

    def get(self, source: Extent, target: Extent) -> T | None:
        """Return what was put for these two, or None."""
        kept = self._kept.get(source)
        return kept[1] if kept is not None and kept[0]() is target else None

    def put(self, source: Extent, target: Extent, value: T) -> None:
        """Keep a value in the place of what there was for ``source``."""
        self._kept[source] = weakref.ref(target), value
