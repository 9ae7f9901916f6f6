"""obstore alone: the same bytes of a store, as ranges of one object, left in buffers of its own."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from xferd.clients.bench._cases import Case, Place
from xferd.clients.bench._kinds import KINDS
from xferd.clients.bench._probes import Probe, System

if TYPE_CHECKING:
    from types import TracebackType

    from xferd.clients.bench._store import Store

CONCURRENCY = 32
"""Requests at once: what a daemon has by default (``max_concurrency`` of a store)."""


class Obstore(System):
    """Gets and puts through obstore in this process; nothing is put in place and nothing is compared.

    Args:
        store: the one that xferd is measured with.
    """

    name: ClassVar[str] = "obstore"

    def __init__(self, store: Store | None) -> None:
        self._store = store
        self._stack = ExitStack()
        self._runner: asyncio.Runner | None = None
        self._client: Any = None

    def refusal(self, case: Case) -> str:
        """Take what goes between an object and memory of the host."""
        if case.place is not Place.LOCAL or case.ends != ("DRAM", "OBJECT"):
            return "it moves objects only"
        if self._store is None:
            return "there is no object store"
        return KINDS["OBJECT"].refusal()

    def probe(self, case: Case) -> Probe:
        """Return the probe."""
        assert self._store is not None
        if self._runner is None:
            self._runner = self._stack.enter_context(asyncio.Runner())
            self._client = _open(self._stack.enter_context(self._store).section)
        return ObstoreProbe(case, self._runner, self._client)

    def settings(self) -> dict[str, object]:
        """Return how many requests there are at once."""
        return {"concurrency": CONCURRENCY}

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._runner, self._client = None, None
        self._stack.close()


class ObstoreProbe(Probe):
    """Reads all ranges of an object at once, or writes the object."""

    system: ClassVar[str] = Obstore.name

    def __init__(self, case: Case, runner: asyncio.Runner, client: Any) -> None:
        super().__init__(case)
        self._runner, self._client = runner, client
        self._module = import_module("obstore")
        self._key = f"obstore-{case.nbytes}"
        self._data = bytes(case.nbytes)

    def begin(self, visit: int) -> None:
        """Put the object there, with bytes of this visit."""
        self._data = (visit % 251 + 1).to_bytes(1, "little") * self.case.nbytes
        self._runner.run(self._put())

    def request(self) -> None:
        """Get or put."""
        moved = self._runner.run(self._get() if self.case.op == "READ" else self._put())
        assert moved == self.case.nbytes, "a short answer"

    async def _get(self) -> int:
        gate, size = asyncio.Semaphore(CONCURRENCY), self.case.block_nbytes

        async def one(number: int) -> int:
            async with gate:
                span = {"start": number * size, "length": size}
                return len(await self._module.get_range_async(self._client, self._key, **span))

        return sum(await asyncio.gather(*map(one, range(self.case.batch))))

    async def _put(self) -> int:
        await self._module.put_async(self._client, self._key, self._data)
        return len(self._data)


def _open(section: dict[str, str]) -> Any:
    """Open a store as the daemon does, as far as a benchmark needs it: S3 and what speaks it."""
    stores = import_module("obstore.store")
    options: dict[str, Any] = {"region": section.get("region", "us-east-1")}
    if section.get("endpoint"):
        options["endpoint"] = section["endpoint"]
    if section.get("anonymous") == "true":
        options["skip_signature"] = True
    if section.get("allow_http") == "true":
        options["client_options"] = {"allow_http": True}
    return stores.from_url(section["url"], **options)
