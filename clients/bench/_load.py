"""The load that runs beside what is measured: large transfers, LOW, each posted again as soon as it has ended."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from xferd.api.errors import Cancelled
from xferd.api.types import ENDED, Priority, TransferState
from xferd.clients.transfers import checked

if TYPE_CHECKING:
    from xferd.api.types import TransferOp, TransferStatus
    from xferd.clients.sync import Client, Region, Transfer

LOAD_NBYTES = 1 << 30
"""Bytes of one transfer; it goes over its regions as often as it takes."""

WAIT_S = 10.0


class Load:
    """So many transfers under way from now until ``stop``; owns a thread that posts them again.

    All of them move the same two regions, which costs no memory and changes nothing for who shares the machine.
    """

    def __init__(self, client: Client, op: TransferOp, local: Region, remote: Region, count: int) -> None:
        self._client = client
        self._stopping = threading.Event()
        self._moved_nbytes = 0
        self._failure: Exception | None = None
        span = min(local.nbytes, remote.nbytes)
        times = np.zeros(-(-LOAD_NBYTES // span), np.uint64)
        self._nbytes = len(times) * span
        # Transfers alive at once would write the same bytes twice within a list: harmless, all sources are equal.
        self._transfers = [
            client.transfer(op, local.rows(times, span), remote.rows(times, span), hold=True, priority=Priority.LOW)
            for _ in range(count)
        ]
        self._started = time.perf_counter()
        for transfer in self._transfers:
            transfer.post()
        self._thread = threading.Thread(target=self._keep_going, name="load")
        self._thread.start()

    def stop(self) -> float:
        """End all of them; returns the bytes a second that they moved. Raises what one of them failed with."""
        self._stopping.set()
        seconds = time.perf_counter() - self._started
        ended = self._client.cancel(self._transfers)
        self._thread.join()
        self._client.release(self._transfers)
        if self._failure is not None:
            raise self._failure
        self._moved_nbytes += sum(one.telemetry.moved_nbytes for one in ended if one.state is TransferState.CANCELLED)
        return self._moved_nbytes / seconds

    def _keep_going(self) -> None:
        try:
            while not self._stopping.is_set():
                statuses = self._client.wait_many(self._transfers, WAIT_S, any=True)
                for transfer, status in zip(self._transfers, statuses, strict=True):
                    if status.state in ENDED and not self._stopping.is_set():
                        self._post_again(transfer, status)
        except Cancelled:
            return  # by stop
        except Exception as exc:  # noqa: BLE001 - of a thread: told by stop
            self._failure = exc

    def _post_again(self, transfer: Transfer, status: TransferStatus) -> None:
        checked(status)
        self._moved_nbytes += self._nbytes
        transfer.post()
