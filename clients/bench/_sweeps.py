"""Sweeps: the product of what the command line names, as cases."""

from __future__ import annotations

from dataclasses import dataclass

from xferd.api.errors import InvalidArgument
from xferd.api.units import parse_nbytes
from xferd.clients.bench._cases import CONTROLS, KINDS, ORDERS, PREPARED, SCHEMES, WAITS, Case, Place

MAX_CLIENTS = 64
MAX_CASES = 4096


@dataclass(frozen=True, slots=True)
class Sweep:
    """What each dimension goes through; the values are those of ``Case``."""

    place: tuple[Place, ...] = (Place.LOCAL,)
    op: tuple[str, ...] = ("WRITE",)
    block: tuple[int, ...] = (4096,)
    batch: tuple[int, ...] = (1024,)
    src: tuple[str, ...] = ("DRAM",)
    dst: tuple[str, ...] = ("DRAM",)
    scheme: tuple[str, ...] = ("pairwise",)
    prepared: tuple[str, ...] = ("transfer",)
    control: tuple[str, ...] = ("ring",)
    threads: tuple[int, ...] = (1,)
    clients: tuple[int, ...] = (1,)
    wait: tuple[str, ...] = ("",)
    order: str = "random"
    load: int = 0

    def cases(self) -> tuple[Case, ...]:
        """Return the product, sizes changing fastest.

        Raises:
            InvalidArgument: more cases than anybody waits for.
        """
        made = tuple(
            Case(
                place,
                op,
                block,
                batch,
                src,
                dst,
                scheme,
                prepared,
                control,
                wait,
                threads,
                clients,
                self.order,
                self.load,
            )
            for place in self.place
            for op in self.op
            for src in self.src
            for dst in self.dst
            for scheme in self.scheme
            for clients in self.clients
            for threads in self.threads
            for control in self.control
            for wait in (self.wait if control == "ring" else ("",))
            for prepared in self.prepared
            for batch in self.batch
            for block in self.block
        )
        if len(made) > MAX_CASES:
            raise InvalidArgument(f"{len(made)} cases", limit=f"{MAX_CASES}", remedy="sweep fewer dimensions at once")
        return made


def sizes(text: str) -> tuple[int, ...]:
    """Return block sizes: ``4KiB,64KiB`` or, doubling, ``4KiB:64MiB``; both can be mixed.

    Raises:
        InvalidArgument: no size, a range that ends before it begins, or blocks that are no multiple of 8 bytes.
    """
    found = tuple(size for part in text.split(",") for size in _doubling(part, parse_nbytes))
    for size in found:
        if size % 8:
            raise InvalidArgument(f"blocks of {size} bytes", limit="multiples of 8", remedy="choose another size")
    return found


def counts(text: str, most: int | None = None) -> tuple[int, ...]:
    """Return numbers: ``1,16`` or, doubling, ``1:1024``.

    Raises:
        InvalidArgument: no number, or one that is not within 1 to ``most``.
    """
    found = tuple(number for part in text.split(",") for number in _doubling(part, _count))
    for number in found:
        if most is not None and number > most:
            raise InvalidArgument(f"{number} is too many", limit=f"{most}", remedy="choose a smaller number")
    return found


def clients(text: str) -> tuple[int, ...]:
    """Return numbers of client processes."""
    return counts(text, MAX_CLIENTS)


def places(text: str) -> tuple[Place, ...]:
    """Return ``local``, ``tcp`` or both."""
    return tuple(Place(name) for name in _words(text, (Place.LOCAL.value, Place.TCP.value)))


def ops(text: str) -> tuple[str, ...]:
    """Return READ, WRITE or both."""
    return _words(text, ("READ", "WRITE"))


def kinds(text: str) -> tuple[str, ...]:
    """Return memory kinds."""
    return _words(text, KINDS)


def schemes(text: str) -> tuple[str, ...]:
    """Return schemes."""
    return _words(text, SCHEMES)


def ways(text: str) -> tuple[str, ...]:
    """Return how far requests are prepared."""
    return _words(text, PREPARED)


def controls(text: str) -> tuple[str, ...]:
    """Return control planes."""
    return _words(text, CONTROLS)


def waits(text: str) -> tuple[str, ...]:
    """Return how a client waits at its ring; "" stands for its own way, which adapts."""
    return tuple("" if word == "adaptive" else word for word in _words(text, ("adaptive", *WAITS)))


def order(text: str) -> str:
    """Return how blocks lie."""
    return _words(text, ORDERS)[0]


def _words(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return words of a comma list as they are spelled in ``known``; "all" stands for all of them."""
    by_lower = {word.lower(): word for word in known}
    if text.lower() == "all":
        return known
    found = []
    for word in text.split(","):
        if word.strip().lower() not in by_lower:
            raise InvalidArgument(f"{word!r} is unknown", limit=", ".join(known), remedy="choose one of these, or all")
        found.append(by_lower[word.strip().lower()])
    return tuple(dict.fromkeys(found))


def _doubling(part: str, parse: object) -> list[int]:
    """Return one value, or those from first to last, each twice the one before."""
    assert callable(parse)
    first, colon, last = part.partition(":")
    value, end = parse(first), parse(last) if colon else 0
    if value <= 0 or (colon and end < value):
        raise InvalidArgument(f"{part!r} has nothing in it", remedy="write one value, or FIRST:LAST, from 1 up")
    found = [value]
    while colon and found[-1] * 2 <= end:
        found.append(found[-1] * 2)
    return found


def _count(text: str) -> int:
    if not text.strip().isdecimal():
        raise InvalidArgument(f"{text!r} is no number", remedy="write 4, 1,16 or 1:1024")
    return int(text)
