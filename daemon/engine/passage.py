"""What surrounds the chunks of one post: proof tickets and legs, opened before the first byte and ended after the last.

Most transfers have none of it. Legs are opened where a backend needs that: an object appears as a whole or not at all,
and the file of a durable transfer is put on the disk. Tickets are for storage pools, whose bytes are proven before DONE
is told, and on the disk then in any case. The machine says when to settle and whether to commit; the runner does it by
this.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from xferd.api.errors import Unsupported
from xferd.plugins.base import FileSpace, LegScope, MappedSpace

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping
    from typing import TypeAlias

    from xferd.daemon.engine.machine import Transfer
    from xferd.daemon.engine.plan import Leg, Plan, Route
    from xferd.daemon.engine.sealing import ReadTicket, Sealer, WriteTicket
    from xferd.plugins.base import Backend, Chunk, Extent, OpenLeg, Space

    Move: TypeAlias = Callable[[Chunk], Awaitable[int]]


def is_needed(plan: Plan, backends: Mapping[str, Backend], sealer: Sealer, *, durable: bool) -> bool:
    """Whether posts of a plan have anything to open and to settle."""
    if sealer.concerns([*_sources(plan), *_targets(plan)]):
        return True
    if durable and any(isinstance(target.space, FileSpace) for target in _targets(plan)):
        return True
    return any(
        backends[name].needs_leg(_target(leg, route, hop), durable=False)
        for leg in plan.legs
        for route in leg.routes
        for hop, name in enumerate(route.backends)
    )


class Passage:
    """Of one post of one transfer. Ended once, by ``commit`` or by ``abandon``; used on the event loop."""

    def __init__(self, transfer: Transfer, backends: Mapping[str, Backend], sealer: Sealer) -> None:
        assert transfer.plan is not None
        self._plan = transfer.plan
        self._ids = transfer.wire_id, transfer.cause_id, transfer.agent
        self._verify = transfer.verify
        self._durable = transfer.durable
        self._backends = backends
        self._sealer = sealer
        self._lock = asyncio.Lock()  # hands out moves in the order of the chunks that ask
        self._ticket: WriteTicket | None = None
        self._reading: ReadTicket | None = None
        self._open: dict[tuple[int, str], OpenLeg] = {}

    async def moves(self, number: int, route: Route, start: int) -> list[Move]:
        """Return what moves a chunk of a leg over each hop of a route, after opening what is not open yet. Cancel-safe.

        ``start`` is where the chunk begins in the leg's bytes.

        Raises:
            XferdError: what a backend or a pool said; what was opened stays open until the end.
        """
        async with self._lock:
            if self._ticket is None:
                self._ticket = await self._sealer.begin(_targets(self._plan))
                self._reading = self._sealer.reading(_sources(self._plan), is_asked=self._verify)
            return [await self._move(number, route, hop, start) for hop in range(len(route.hops))]

    async def commit(self) -> None:
        """Make visible and prove what was moved; all chunks have moved.

        What was read is compared first: bytes that are not what was stored must not appear elsewhere as good ones.

        Raises:
            XferdError: what the first that failed said; the others are aborted.
        """
        legs, self._open = list(self._open.values()), {}
        ticket, self._ticket = self._ticket, None
        try:
            if self._reading is not None:
                await self._sealer.finish(self._reading)
            while legs:
                await legs.pop(0).commit()
            if ticket is not None:
                proven, ticket = ticket, None  # sealing ends it, whatever comes of it
                await self._sealer.seal(proven)
        finally:
            await self._drop(legs, ticket)

    async def abandon(self) -> None:
        """Drop what was moved; no chunk is under way."""
        legs, self._open = list(self._open.values()), {}
        ticket, self._ticket = self._ticket, None
        await self._drop(legs, ticket)

    async def _drop(self, legs: Iterable[OpenLeg], ticket: WriteTicket | None) -> None:
        for leg in legs:
            await leg.abort()
        if ticket is not None:
            self._sealer.abandon(ticket)

    async def _move(self, number: int, route: Route, hop: int, start: int) -> Move:
        leg = self._plan.legs[number]
        backend = self._backends[route.backends[hop]]
        target = _target(leg, route, hop)
        durable = self._durable and isinstance(target, FileSpace) and not self._sealer.concerns([leg.target])
        if durable and not backend.can_flush():
            raise Unsupported(
                f"{backend.name} does not put on the disk what it writes to {target}",
                remedy="leave the route to the planner, or 'durable' out",
            )
        move = backend.move
        if backend.needs_leg(target, durable=durable):
            move = (await self._leg(number, leg, route, hop, durable=durable)).move
        if not self._sealer.concerns([leg.source, leg.target]):
            return move
        return self._proven(move, leg, start, is_first=hop == 0, is_last=hop == len(route.hops) - 1)

    def _proven(self, move: Move, leg: Leg, start: int, *, is_first: bool, is_last: bool) -> Move:
        """Return a move that shows the sealer the bytes as they pass, so that it need not read them once more."""

        async def moved(chunk: Chunk) -> int:
            reading = self._reading if is_first else None
            writing = self._ticket if is_last else None
            arriving = leaving = None
            if reading is not None:
                arriving = self._sealer.arriving(reading, leg.source, start, chunk.nbytes, chunk.target)
            if writing is not None:
                leaving = self._sealer.leaving(writing, chunk.source, chunk.target)
            wanted = arriving or leaving  # a hop reads one pool or writes one: between pools there is memory
            nbytes = await move(chunk if wanted is None else replace(chunk, sums=wanted.sums))
            if nbytes == chunk.nbytes:
                if reading is not None and arriving is not None:
                    await self._sealer.arrived(reading, arriving, chunk.source, chunk.target)
                if writing is not None and leaving is not None:
                    await self._sealer.left(writing, leaving, chunk.source)
            return nbytes

        return moved

    async def _leg(self, number: int, leg: Leg, route: Route, hop: int, *, durable: bool) -> OpenLeg:
        name = route.backends[hop]
        key = number, f"{hop} {name}"
        if key not in self._open:
            self._open[key] = await self._backends[name].open_leg(
                LegScope(
                    leg.source if hop == 0 else None,
                    leg.target if hop == len(route.hops) - 1 else None,
                    leg.cuts[-1],
                    *self._ids,
                    durable,
                )
            )
        return self._open[key]


def _target(leg: Leg, route: Route, hop: int) -> Space:
    """Return where a hop of a route goes to: staging memory, or the leg's target for the last."""
    return leg.target.space if hop == len(route.hops) - 1 else MappedSpace()


def _sources(plan: Plan) -> list[Extent]:
    return [leg.source for leg in plan.legs]


def _targets(plan: Plan) -> list[Extent]:
    return [leg.target for leg in plan.legs]
