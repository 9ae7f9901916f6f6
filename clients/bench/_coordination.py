"""Several processes of one benchmark run that find each other in etcd, wait for each other, and exchange results.

What they know of the run is in ``_coordination_board.py``, what they do together in ``_coordination_run.py``. All keys
of a run are under ``/xferbench/NAME/`` and under leases, so that nothing is left of a run for longer than a lease, and
what is left is never taken for the next one's:

- ``leader`` is claimed by whoever comes first. Its value is a random id: that of this run, and of its first member.
- ``ID/members/MEMBER`` says that a process wants to take part, or still does. Its end is the end of the run for all.
- ``ID/group`` is written once by the leader when enough have come: members and where they run, in the order of their
  ranks. A process that joined a run which never came about, because its leader died, sees the claim end and
  starts anew.
- ``ID/steps/NUMBER/RANK/PART`` is what a rank has to say at a step.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from xferd.api.errors import DeadlineExceeded, InvalidArgument, NotFound, PeerLost, Unavailable, XferdError
from xferd.clients.bench._coordination_board import Board, parts_of
from xferd.clients.bench._coordination_etcd import Etcd, Watch

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
ROOT = "/xferbench/"
TTL_S = 5
JOIN_TIMEOUT_S = 120.0
STEP_TIMEOUT_S = 600.0
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Coordinator:
    """One process's place in a run of several. A context manager: inside, all of them have found each other.

    While inside, every wait ends with ``PeerLost`` as soon as another process ends or its lease does.

    Args:
        url: of etcd, ``http://host:2379``.
        name: of the run, the same for all its processes; runs of one name may follow each other at once.
        ranks: how many processes there are.
        ttl_s: seconds after which a process that died is noticed.
        timeout_s: for all to come.

    Raises:
        InvalidArgument: on making it, if the name or the URL cannot be.
        DeadlineExceeded: on entering, if not all came.
        Unavailable: on entering or later, if etcd does not answer.
    """

    def __init__(
        self, url: str, name: str, ranks: int, *, ttl_s: int = TTL_S, timeout_s: float = JOIN_TIMEOUT_S
    ) -> None:
        if not _NAME.fullmatch(name):
            raise InvalidArgument(
                f"run {name!r}", limit="1 to 64 letters, digits, '.', '_', '-'", remedy="choose another name"
            )
        self._etcd = Etcd(url)
        self._prefix = f"{ROOT}{name}/"
        self.ranks, self.rank, self.run = ranks, -1, ""
        self._ttl_s, self._timeout_s = ttl_s, timeout_s
        self._id = secrets.token_hex(8)
        self._lease = ""
        self._changed = threading.Condition()
        self._failure: XferdError | None = None
        self._leaving = threading.Event()
        self._threads: list[threading.Thread] = []
        self._watch: Watch | None = None
        self._board = Board(self._prefix, "")
        self._step = 0

    def __enter__(self) -> Self:
        self._lease = self._etcd.grant(self._ttl_s)
        try:
            self._start(self._keep_lease, "lease")
            deadline = time.monotonic() + self._timeout_s
            while not self._join(deadline):
                pass  # the leader went away before there was a group: there will be another
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def barrier(self, name: str) -> None:
        """Wait until all are here."""
        self.exchange(name, None)

    def exchange(self, name: str, value: object) -> list[Any]:  # JSON values of all ranks
        """Say something at a step, and return what all ranks said, in their order.

        Args:
            name: of the step; all ranks go through the same ones in the same order.
            value: anything that JSON can hold.

        Raises:
            PeerLost: a process has ended, or is cut off.
            DeadlineExceeded: somebody did not come here in time.
            InvalidArgument: another rank is at another step: it was started with other options.
        """
        self._step += 1
        step, board = self._step, self._board
        for number, part in enumerate(parts_of([name, value])):
            self._put(f"{self.run}/steps/{step}/{self.rank}/{number}", part)

        def missing() -> list[int]:
            return [rank for rank in range(self.ranks) if board.said(step, rank) is None]

        def is_over() -> bool:
            return not missing() or bool(board.lost)

        if not self._wait(is_over, time.monotonic() + STEP_TIMEOUT_S):
            who = ", ".join(board.who(rank) for rank in missing())
            raise DeadlineExceeded(f"{who} did not come to {name!r}", limit=f"{STEP_TIMEOUT_S:g} s")
        # Whoever left in order did so after all had said what they have to say: changes come in order.
        if missing():
            raise self._lost()
        said = [found for rank in range(self.ranks) if (found := board.said(step, rank))]
        board.forget(step)
        for rank, (at, _) in enumerate(said):
            if at != name:
                raise InvalidArgument(
                    f"{board.who(rank)} is at {at!r}, this one at {name!r}", remedy="start all with the same options"
                )
        return [what for _, what in said]

    def blame(self, error: XferdError) -> None:
        """Say whether something failed because another rank is gone, which takes a lease's time to be known.

        Raises:
            PeerLost: so it was; ``__cause__`` is the error. Returns otherwise.
        """
        if self._wait(lambda: bool(self._board.lost), time.monotonic() + self._ttl_s + 1):
            raise self._lost() from error

    def _lost(self) -> PeerLost:
        who = ", ".join(self._board.who(rank) for rank in sorted(self._board.lost))
        return PeerLost(f"{who} has ended or is cut off", remedy="see what it printed, and start all ranks again")

    def _join(self, deadline: float) -> bool:
        """Take part in the run of whoever leads; returns False if that did not come about."""
        claim = self._etcd.claim(f"{self._prefix}leader", self._id.encode(), self._lease)
        self.run = claim.value.decode()
        board = self._board = Board(self._prefix, self.run)
        self._watch_from(claim.revision + 1, board)
        self._put(f"{self.run}/members/{self._id}", _label().encode())
        if claim.is_ours:
            self._must(lambda: len(board.members) >= self.ranks, deadline)
            # Ranks are in the order of arrival, the leader's first.
            group = sorted(list(board.members.items())[: self.ranks], key=lambda member: member[0] != self._id)
            self._put(f"{self.run}/group", json.dumps(group).encode())
        self._must(lambda: bool(board.group) or board.is_leaderless, deadline)
        if claim.is_ours:
            self._etcd.delete(f"{self._prefix}leader")  # the next run of this name may begin
        if self._id not in board.group:
            self._must(lambda: board.is_leaderless, deadline)  # there were enough without this one
            return False
        if len(board.group) != self.ranks:
            raise InvalidArgument(
                f"{self.ranks} ranks, where the first to come wants {len(board.group)}",
                remedy="start all with the same number",
            )
        self.rank = board.group.index(self._id)
        return True

    def _put(self, key: str, value: bytes) -> None:
        try:
            self._etcd.put(self._prefix + key, value, self._lease)
        except NotFound as exc:
            raise self._lease_ended() from exc

    def _lease_ended(self) -> PeerLost:
        return PeerLost(
            "this rank was cut off from etcd, or stopped, until its lease ended",
            limit=f"{self._ttl_s} s",
            remedy="start all ranks again",
        )

    def _must(self, predicate: Callable[[], bool], deadline: float) -> None:
        if not self._wait(predicate, deadline):
            raise DeadlineExceeded(
                f"{len(self._board.members)} of {self.ranks} ranks have come to {self._prefix}",
                limit=f"{self._timeout_s:g} s",
                remedy="start the others, with the same --etcd and --name",
            )

    def _wait(self, predicate: Callable[[], bool], deadline: float) -> bool:
        """Wait for what the board says; raises what the threads failed with."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or predicate(), max(deadline - time.monotonic(), 0.0))
            if predicate():
                return True
            if self._failure is not None:
                raise self._failure
            return False

    def _watch_from(self, revision: int, board: Board) -> None:
        """Feed a board from now on, and no other."""
        self._end_watch()
        self._watch = watch = self._etcd.watch(self._prefix, revision)
        self._start(lambda: self._feed(watch, board), "watch")

    def _feed(self, watch: Watch, board: Board) -> None:
        try:
            for change in watch:
                with self._changed:
                    board.see(change)
                    self._changed.notify_all()
        except Unavailable as error:
            self._fail(error)
        finally:
            watch.release()

    def _keep_lease(self) -> None:
        """Renew the lease until told to leave. It is lost when it could not be renewed for its whole time."""
        good_until = time.monotonic() + self._ttl_s
        while not self._leaving.wait(self._ttl_s / 4):
            try:
                if not self._etcd.renew(self._lease):
                    self._fail(self._lease_ended())
                    return
                good_until = time.monotonic() + self._ttl_s
            except Unavailable as error:
                if time.monotonic() > good_until:
                    self._fail(error)
                    return

    def _fail(self, error: XferdError) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _start(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=f"coordination-{name}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _leave(self) -> None:
        """Take this rank's keys away, which tells the others at once, and end the threads."""
        self._leaving.set()
        self._end_watch()
        with suppress(Unavailable, NotFound):  # the lease ends by itself, or has
            self._etcd.revoke(self._lease)
        for thread in self._threads:
            thread.join()
        self._threads.clear()


def _label() -> str:
    return f"{socket.gethostname()} process {os.getpid()}"
