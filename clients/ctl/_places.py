"""What ``cp``, ``explain`` and ``estimate`` take as source and target: how it is written, read and shown.

A place is ``file:PATH``, a file under the daemon's roots, ``object:STORE/KEY``, an object of a configured store, or
``region:ID[@NODE][+OFFSET]``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from xferd.api.errors import InvalidArgument
from xferd.api.types import RegionId
from xferd.api.units import parse_nbytes

_REGION = re.compile(r"(\d{1,20})(?:@([^+@]+))?(?:\+(.+))?", re.ASCII | re.DOTALL)
_REMEDY = "write file:PATH, object:STORE/KEY, or region:ID, region:ID@NODE, region:ID+OFFSET"


@dataclass(frozen=True, slots=True)
class Place:
    """A file or an object from its start, or a region from an offset on.

    Attributes:
        path: of the file, absolute or relative to the daemon's first root; "" for anything else.
        region: id of the region; None for anything else.
        node: where the region is; "" is the node that the command talks to.
        offset: in the region.
        store: of the object; "" for anything else.
        key: of the object.
    """

    path: str = ""
    region: RegionId | None = None
    node: str = ""
    offset: int = 0
    store: str = ""
    key: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"file:{self.path}"
        if self.store:
            return f"object:{self.store}/{self.key}"
        at = f"@{self.node}" if self.node else ""
        plus = f"+{self.offset}" if self.offset else ""
        return f"region:{self.region}{at}{plus}"


def parse_place(text: str) -> Place:
    """Read a place.

    Raises:
        InvalidArgument: it is none.
    """
    kind, colon, rest = text.partition(":")
    if not colon or not rest or kind not in ("file", "object", "region"):
        raise InvalidArgument(f"{text!r} is no place", remedy=_REMEDY)
    if kind == "file":
        return Place(path=rest)
    if kind == "object":
        store, _, key = rest.partition("/")
        if not store or not key:
            raise InvalidArgument(f"{text!r} names no object", remedy=_REMEDY)
        return Place(store=store, key=key)
    match = _REGION.fullmatch(rest)
    if match is None or int(match[1]) >= 1 << 64:
        raise InvalidArgument(f"{text!r} names no region", limit="ids are numbers below 2**64", remedy=_REMEDY)
    offset = parse_nbytes(match[3]) if match[3] else 0
    return Place(region=RegionId(int(match[1])), node=match[2] or "", offset=offset)


def span_nbytes(source_nbytes: int, target_nbytes: int, wanted: int | None, *, source: Place, target: Place) -> int:
    """Return how many bytes to move between two places that have so many bytes from their offsets on.

    Raises:
        InvalidArgument: there is nothing to move, or one of them is too small. ``cp`` never copies a part unasked.
    """
    nbytes = source_nbytes if wanted is None else wanted
    if nbytes > source_nbytes:
        raise InvalidArgument(
            f"{nbytes} bytes are asked of {source}", limit=f"{source_nbytes} bytes there", remedy="ask for less"
        )
    if nbytes <= 0:
        raise InvalidArgument(f"nothing to move from {source}", remedy="name a source with at least one byte")
    if nbytes > target_nbytes:
        raise InvalidArgument(
            f"{nbytes} bytes do not fit into {target}",
            limit=f"{max(target_nbytes, 0)} bytes there",
            remedy="name a larger target, or move a part with --nbytes",
        )
    return nbytes
