"""xferd measured: two daemons of its own on loopback, moves within one and between both, calls, long lists."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar, Self

import grpc
import numpy as np

from xferd.api.types import Access, TransferOp
from xferd.clients._calls import channel_options
from xferd.clients.bench import _cases as cases
from xferd.clients.bench._cases import Case, Place
from xferd.clients.bench._cpu import cpu_of
from xferd.clients.bench._patterns import Blocks
from xferd.clients.bench._probes import Probe, System
from xferd.clients.nodes import Nodes
from xferd.clients.sync import Client

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from xferd.clients.bench._patterns import Rows
    from xferd.clients.sync import PreparedList, Region
    from xferd.clients.transfers import ListLike

SLACK_NBYTES = 1 << 20
HEALTH_CHECK = "/grpc.health.v1.Health/Check"


class Xferd(System):
    """Starts daemons "a" and "b" and attaches to both; each has a source and a target region of equal size.

    A transfer between nodes is asked of "b" ("decode" asks, as with a KV cache) and reaches into "a".
    """

    name: ClassVar[str] = "xferd"

    def __init__(self, region_nbytes: int) -> None:
        self._region_nbytes = region_nbytes
        self._stack = ExitStack()
        self._prepared: dict[tuple[str, str, int], PreparedList] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            nodes = stack.enter_context(Nodes())
            pool = f'pools=[{{name="host", nbytes={2 * self._region_nbytes + SLACK_NBYTES}}}]'
            a = nodes.start("a", settings=[pool])
            b = nodes.start("b", peers=[a], settings=[pool])
            self._pids = [a.pid, b.pid]
            self._near = stack.enter_context(Client.connect(a.session_socket, agent="bench"))
            self._far = stack.enter_context(Client.connect(b.session_socket, agent="bench"))
            self._regions: dict[str, Region] = {}
            for client, node in ((self._near, "a"), (self._far, "b")):
                sizes = [self._region_nbytes] * 2
                source, target = client.allocate(sizes, access=Access.READ_WRITE, label="bench")
                self._regions |= {f"{node}.source": source, f"{node}.target": target}
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._prepared.clear()
        self._regions.clear()
        self._stack.close()

    def settings(self) -> dict[str, object]:
        """Return what the daemons run with: their defaults."""
        return {"version": self._near.node().version, "configuration": "defaults", "region_nbytes": self._region_nbytes}

    def refusal(self, case: Case) -> str:
        """Refuse what has no probe yet."""
        if case.place is Place.LIMIT:
            return "a limit of the machine"
        if case.scheme != "pairwise" or (case.src, case.dst) != ("DRAM", "DRAM"):
            return f"{case.scheme} {case.src} to {case.dst} is not implemented"
        return ""

    def probe(self, case: Case) -> Probe:
        """Return the probe of a case."""
        if case == cases.ECHO:
            return CallProbe(case, self._echo(), self._pids)
        if case == cases.NODE:
            return CallProbe(case, lambda: self._near.node(), self._pids)
        return self._mover(case)

    def _mover(self, case: Case) -> MoveProbe:
        op = TransferOp.READ if case.op == "READ" else TransferOp.WRITE
        client, source, target = self._near, "a.source", "a.target"
        if case.place is Place.TCP:
            client = self._far
            source, target = ("a.source", "b.target") if op is TransferOp.READ else ("b.source", "a.target")
        local, remote = (target, source) if op is TransferOp.READ else (source, target)
        blocks = {name: self._list(client, name, case) for name in (local, remote)}
        return MoveProbe(
            case,
            client,
            op,
            blocks[local],
            blocks[remote],
            Blocks(self._regions[source].array(), case.block_nbytes),
            Blocks(self._regions[target].array(), case.block_nbytes),
            self._pids,
        )

    def _list(self, client: Client, region: str, case: Case) -> Callable[[Rows], ListLike]:
        """Return what makes a list of block numbers of a region: by index into a prepared list, or anew."""
        # As the client sees it: a region of the other node is found by asking its own.
        known = self._regions[region]
        if known.info.node != client.grant.node:
            [known] = client.regions(node=known.info.node, ids=[known.id])
        if not case.prepared:
            return lambda rows: known.blocks(rows, case.block_nbytes)
        key = client.grant.node, region, case.block_nbytes
        if key not in self._prepared:
            count = known.nbytes // case.block_nbytes
            self._prepared[key] = client.prepare(known.blocks(np.arange(count), case.block_nbytes))
        return self._prepared[key].select

    def _echo(self) -> Callable[[], object]:
        """Return a call of the health service: an empty request, and an answer of two bytes."""
        options = channel_options(self._near.grant.limits.max_message_nbytes)
        channel = self._stack.enter_context(grpc.insecure_channel(self._near.grant.grpc_target, options=options))
        check: Callable[[bytes], bytes] = channel.unary_unary(HEALTH_CHECK)
        return lambda: check(b"")


class CallProbe(Probe):
    """Makes one call."""

    system: ClassVar[str] = Xferd.name

    def __init__(self, case: Case, call: Callable[[], object], pids: list[int]) -> None:
        super().__init__(case)
        self._call = call
        self._pids = pids

    def request(self) -> None:
        """Make the call."""
        self._call()

    def cpu_s(self) -> tuple[float, float]:
        """Return that of the daemons and of this process."""
        return cpu_of(self._pids), super().cpu_s()[1]


class MoveProbe(CallProbe):
    """Moves random blocks to random places, and waits; or only asks how it would be done (``explain``)."""

    def __init__(
        self,
        case: Case,
        client: Client,
        op: TransferOp,
        local: Callable[[Rows], ListLike],
        remote: Callable[[Rows], ListLike],
        source: Blocks,
        target: Blocks,
        pids: list[int],
    ) -> None:
        super().__init__(case, self._move, pids)
        self._client = client
        self._op = op
        self._make_local, self._make_remote = local, remote
        self._source, self._target = source, target
        self._visit = 0

    def begin(self, visit: int) -> None:
        """Choose blocks on both sides, stamp the source, clear the target, make the lists."""
        rng = np.random.default_rng(visit)
        self._visit = visit
        self._source_rows = rng.permutation(self._source.count)[: self.case.batch]
        self._target_rows = rng.permutation(self._target.count)[: self.case.batch]
        self._source.stamp(self._source_rows, visit)
        self._target.clear()
        is_read = self._op is TransferOp.READ
        self._local = self._make_local(self._target_rows if is_read else self._source_rows)
        self._remote = self._make_remote(self._source_rows if is_read else self._target_rows)

    def verify(self) -> str | None:
        """Compare with the pattern; ``explain`` moves nothing, and must not have."""
        if self.case.op == cases.EXPLAIN.op:
            return "bytes were moved" if self._target.words.any() else None
        return str(self._target.fault(self._target_rows, self._source_rows, self._visit) or "")

    def _move(self) -> None:
        if self.case.op == cases.EXPLAIN.op:
            self._client.explain(self._op, self._local, self._remote)
        elif self._op is TransferOp.READ:
            self._client.read(self._local, self._remote)
        else:
            self._client.write(self._local, self._remote)
