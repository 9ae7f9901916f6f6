"""Fetching a blob under a label, with a deadline."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from xferd.api.errors import NotFound

if TYPE_CHECKING:
    from xferd.metadata.base import Store

FIRST_DELAY_S = 0.05
LAST_DELAY_S = 1.0


async def fetch_blob(store: Store, node: str, label: str, timeout_s: float) -> bytes:
    """Return the blob that a node keeps under a label, waiting up to ``timeout_s`` for it to appear.

    The store is asked again at growing, jittered intervals: a watch for each label that somebody waits for would cost
    it more than the few questions of one wait.

    Raises:
        NotFound: it did not appear in time.
    """
    loop = asyncio.get_running_loop()
    deadline, delay_s = loop.time() + timeout_s, FIRST_DELAY_S
    while True:
        try:
            return await store.get_blob(node, label)
        except NotFound as exc:
            left_s = deadline - loop.time()
            if left_s <= 0:
                exc.limit = exc.limit or f"{timeout_s:g} s"
                raise
        await asyncio.sleep(min(left_s, delay_s * random.uniform(0.5, 1.0)))
        delay_s = min(2 * delay_s, LAST_DELAY_S)
