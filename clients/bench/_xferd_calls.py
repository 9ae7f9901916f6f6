"""Probes of calls that move no payload: an empty echo, ``node()``, and ``explain`` of a long list."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar, Self

import grpc
import numpy as np

from xferd.api.types import TransferOp
from xferd.clients._calls import channel_options
from xferd.clients.bench import _cases as cases
from xferd.clients.bench._attach import attach
from xferd.clients.bench._cpu import cpu_of
from xferd.clients.bench._probes import Probe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType

    from xferd.clients.bench._cases import Case
    from xferd.clients.sync import Client

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
LIST_REGION_NBYTES = cases.LIST_NBYTES * cases.LIST_ROWS


class CallProbe(Probe):
    """Makes one call of a client in this process."""

    system: ClassVar[str] = "xferd"

    def __init__(self, case: Case, call: Callable[[], object], daemons: Sequence[int]) -> None:
        super().__init__(case)
        self._call = call
        self._daemons = list(daemons)

    def request(self) -> None:
        """Make the call."""
        self._call()

    def cpu_s(self) -> tuple[float, float]:
        """Return that of the daemons and of this process."""
        return cpu_of(self._daemons), super().cpu_s()[1]


class Calls:
    """A client in this process with what calls need. A context manager that closes it."""

    def __init__(self, session_socket: Path, daemons: Sequence[int]) -> None:
        self._stack = ExitStack()
        self._session_socket = session_socket
        self._daemons = daemons
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """The client, attached when first used."""
        if self._client is None:
            self._client = self._stack.enter_context(attach(self._session_socket, "bench", "grpc"))
        return self._client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(exc_type, exc, traceback)

    def probe(self, case: Case) -> Probe:
        """Return the probe of a call."""
        made = {cases.ECHO.op: self._echo, cases.NODE.op: self._node, cases.EXPLAIN.op: self._explain}[case.op](case)
        return CallProbe(case, made, self._daemons)

    def _echo(self, _case: Case) -> Callable[[], object]:
        """Return a call of the health service: an empty request, and an answer of two bytes."""
        grant = self.client.grant
        options = channel_options(grant.limits.max_message_nbytes)
        channel = self._stack.enter_context(grpc.insecure_channel(grant.grpc_target, options=options))
        check: Callable[[bytes], bytes] = channel.unary_unary(HEALTH_CHECK)
        return lambda: check(b"")

    def _node(self, _case: Case) -> Callable[[], object]:
        return lambda: self.client.node()

    def _explain(self, case: Case) -> Callable[[], object]:
        """Return a call that lets the daemon take in, check, coalesce and plan both lists, and move nothing."""
        local, remote = self.client.allocate([case.nbytes] * 2, label="bench")
        rng = np.random.default_rng(0)
        lists = [region.blocks(rng.permutation(case.batch), case.block_nbytes) for region in (local, remote)]
        return lambda: self.client.explain(TransferOp.WRITE, *lists)
