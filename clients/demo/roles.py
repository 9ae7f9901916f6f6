"""The three processes of the demonstration: one that does everything itself, one that reads, one that writes.

Each is held by a ``workers.Worker`` and called by ``show.py``, which decides what happens when. What they need of each
other they learn by notifications through their daemons, as engines on two machines would.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from xferd.api.types import Access, TransferOp
from xferd.clients.demo import paging
from xferd.clients.demo.engine_cache import PagedCache, prepare_remote
from xferd.clients.demo.handover import TAKEN, CacheOffer, Handover
from xferd.clients.demo.model import LanguageModel, ModelShape
from xferd.clients.sync import Client

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from xferd.api.types import NodeInfo, Notification, TransferStatus
    from xferd.clients.demo.checks import Generation
    from xferd.clients.demo.paging import BlockTable, FloatArray, Geometry
    from xferd.clients.sync import PreparedList

NOTIFICATION_TIMEOUT_S = 120.0
PREFILL_SEED, DECODE_SEED, RESUME_SEED = 11, 22, 33
"""Block orders differ between the nodes, and are the same in every run."""


@dataclass(frozen=True, slots=True)
class Leg:
    """One transfer as its client saw it (``wall_s``) and as the daemon did."""

    wall_s: float
    status: TransferStatus


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What the prefill process did for a hand-over, in seconds."""

    prefill_s: float
    scatter_s: float


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the decode process made of a hand-over. ``ttft_s`` counts from the arrival of the notification."""

    generation: Generation
    leg: Leg
    ttft_s: float
    gather_s: float


@dataclass(frozen=True, slots=True)
class Found:
    """A node's record, and how long its daemon's client waited for it."""

    node: NodeInfo
    wall_s: float


class _Role:
    """What all have in common: a model, and things to close at the end."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._model: LanguageModel | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def load(self, folder: Path) -> ModelShape:
        """Load the converted model."""
        self._model = LanguageModel(folder)
        return self._model.shape

    def warm_up(self, tokens: Sequence[int]) -> None:
        """Compute once what will be measured, so that no first time is in the figures."""
        self._ready_model.generate(self._ready_model.prefill(tokens[:-1]), tokens[-1], 1)

    @property
    def _ready_model(self) -> LanguageModel:
        assert self._model is not None, "load comes first"
        return self._model


class Reference(_Role):
    """One process that reads the prompt and writes the answer with a cache of its own: what all must equal."""

    def convert(self, folder: Path) -> None:
        """Unpack the model once for all processes."""
        LanguageModel.convert(folder)

    def encode(self, prompt: str) -> list[int]:
        """Return the prompt's tokens."""
        return self._ready_model.encode(prompt)

    def answer(self, tokens: Sequence[int], count: int) -> Generation:
        """Read all tokens but the last, then write ``count``."""
        return self._ready_model.generate(self._ready_model.prefill(tokens[:-1]), tokens[-1], count)


class _Attached(_Role):
    """A role with a client and a cache in the pool of its daemon."""

    agent: str
    access: Access

    def attach(self, session_socket: Path, geometry: Geometry) -> None:
        """Open a session and allocate the cache."""
        self._client = self._stack.enter_context(Client.connect(session_socket, self.agent))
        self._cache = PagedCache(self._client, geometry, access=self.access, label=f"{self.agent} kv")

    def find(self, node: str) -> Found:
        """Ask the daemon for another node by its name."""
        started = time.perf_counter()
        info = self._client.node(node)
        return Found(info, time.perf_counter() - started)

    def _next_notification(self) -> Notification:
        received = self._client.notifications(NOTIFICATION_TIMEOUT_S, limit=1)
        if not received:
            raise TimeoutError(f"{self._client.address} heard nothing for {NOTIFICATION_TIMEOUT_S:g} s")
        return received[0]


class Prefill(_Attached):
    """Reads prompts. Its cache may be read by agents of other nodes, and written by nobody else."""

    agent = "prefill"
    access = Access.READ

    def offer(self, target: str) -> None:
        """Tell the decode agent where the cache is."""
        self._client.notify(target, CacheOffer(self._cache.geometry, self._cache.region_ids).to_bytes())

    def hand_over(self, tokens: Sequence[int], target: str) -> Prefilled:
        """Read the prompt, lay its KV into blocks of the pool, and tell the decode agent."""
        model, started = self._ready_model, time.perf_counter()
        kv = model.export(model.prefill(tokens[:-1]))
        prefilled = time.perf_counter()
        self._tokens = tuple(tokens)
        self._table = paging.scattered_table(self._cache.geometry, len(tokens) - 1, PREFILL_SEED)
        paging.scatter(kv, self._cache.layers, self._table)
        scattered = time.perf_counter()
        self._client.notify(target, Handover(self._tokens, tuple(self._table.tolist())).to_bytes())
        return Prefilled(prefilled - started, scattered - prefilled)

    def confirm(self) -> None:
        """Wait until the blocks have been taken."""
        notification = self._next_notification()
        if notification.payload != TAKEN:
            raise ValueError(f"expected {TAKEN!r} from the decode agent, got {notification.payload[:80]!r}")

    def store(self, path: Path) -> Leg:
        """Write the blocks to a file, one after the other, and give the pool its memory back."""
        geometry = self._cache.geometry
        nbytes = geometry.spans_of(self._table) * geometry.block_nbytes
        with self._client.register_file(path, nbytes=nbytes, writable=True, create=True) as file:
            leg = _timed(self._client, TransferOp.WRITE, self._cache.blocks(self._table), file)
        self._cache.free()
        return leg

    def point_to(self, path: Path, target: str) -> None:
        """Tell the decode agent that the KV is in a file."""
        self._client.notify(target, Handover(self._tokens, file=str(path)).to_bytes())


class Decode(_Attached):
    """Writes answers from KV that others made. Nobody else may touch its cache."""

    agent = "decode"
    access = Access.NONE

    def meet(self) -> float:
        """Take the offer of the prefill agent and prepare its list; returns the seconds that this took."""
        notification = self._next_notification()
        started = time.perf_counter()
        offer = CacheOffer.from_bytes(notification.payload)
        self._source = notification.source
        node = self._source.rpartition("@")[2]
        self._remote_geometry = offer.geometry
        self._remote: PreparedList = prepare_remote(self._client, node, offer.geometry, offer.regions)
        return time.perf_counter() - started

    def receive(self, count: int) -> Decoded:
        """Wait for a hand-over, READ its blocks from the other node, and write ``count`` tokens."""
        notification = self._next_notification()
        started = time.perf_counter()
        handover = Handover.from_bytes(notification.payload)
        table = paging.scattered_table(self._cache.geometry, handover.cached_tokens, DECODE_SEED)
        self._local = self._cache.blocks(table)
        self._there = self._remote.select(paging.block_rows(self._remote_geometry, np.array(handover.table)))
        leg = _timed(self._client, TransferOp.READ, self._local, self._there, tell=self._source)
        return self._decode(handover, table, leg, started, count)

    def read_again(self, times: int) -> list[Leg]:
        """Post the same READ again, some times: what it takes once connections and plans are there."""
        legs = []
        with self._client.transfer(TransferOp.READ, self._local, self._there, hold=True) as transfer:
            for _ in range(times):
                started = time.perf_counter()
                transfer.post()
                status = transfer.wait()
                legs.append(Leg(time.perf_counter() - started, status))
        return legs

    def resume(self, count: int) -> Decoded:
        """Wait for a hand-over by file, load it into blocks that were wiped before, and write ``count`` tokens."""
        self._cache.wipe()
        notification = self._next_notification()
        started = time.perf_counter()
        handover = Handover.from_bytes(notification.payload)
        table = paging.scattered_table(self._cache.geometry, handover.cached_tokens, RESUME_SEED)
        with self._client.register_file(handover.file) as file:
            leg = _timed(self._client, TransferOp.READ, self._cache.blocks(table), file)
        return self._decode(handover, table, leg, started, count)

    def recompute(self, tokens: Sequence[int], times: int) -> list[float]:
        """Read the whole prompt here instead; returns the seconds until the logits of the first token, each time."""
        took = []
        for _ in range(times):
            started = time.perf_counter()
            self._ready_model.prefill_to_logits(tokens)
            took.append(time.perf_counter() - started)
        return took

    def _decode(self, handover: Handover, table: BlockTable, leg: Leg, started: float, count: int) -> Decoded:
        gathering = time.perf_counter()

        def fill(kv: FloatArray) -> None:
            paging.gather(self._cache.layers, table, kv)

        cache = self._ready_model.restore(self._cache.geometry.kv_shape(handover.cached_tokens), fill)
        gathered = time.perf_counter()
        first: list[float] = []
        generation = self._ready_model.generate(
            cache, handover.tokens[-1], count, lambda: first.append(time.perf_counter())
        )
        return Decoded(generation, leg, first[0] - started, gathered - gathering)


def _timed(client: Client, op: TransferOp, local: Any, remote: Any, *, tell: str = "") -> Leg:
    """Run one transfer to its end; ``tell`` is the agent that hears of its last byte."""
    started = time.perf_counter()
    run = client.read if op is TransferOp.READ else client.write
    status = run(local, remote, notification=(tell, TAKEN)) if tell else run(local, remote)
    return Leg(time.perf_counter() - started, status)
