"""What the doctor says of storage pools and object stores: pure checks, as in ``doctor.py``, and one look at stores.

How full a pool is, is among the checks of all pools.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xferd.api.errors import PermissionDenied, XferdError
from xferd.api.timeouts import timeout
from xferd.api.types import Check, CheckState
from xferd.api.units import format_nbytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xferd.api.types import StorageInfo
    from xferd.plugins.base import ObjectCatalog

PROBE_PREFIX = "xferd-doctor/"
"""What is listed to see whether a store answers; nothing is expected there, so that the answer is short."""


@dataclass(frozen=True, slots=True)
class StoreFact:
    """A configured object store that was asked for a listing: ``error`` and ``remedy`` are "" where it answered.

    ``may_list`` is False where it answered that these credentials may not list, which says nothing of reads.
    """

    name: str
    error: str = ""
    remedy: str = ""
    may_list: bool = True


async def look_at_stores(catalog: ObjectCatalog | None, timeout_s: float) -> tuple[StoreFact, ...]:
    """Ask each store, all at once. Cancel-safe."""
    if catalog is None:
        return ()
    return tuple(await asyncio.gather(*(_ask(catalog, name, timeout_s) for name in catalog.stores())))


async def _ask(catalog: ObjectCatalog, name: str, timeout_s: float) -> StoreFact:
    try:
        async with timeout(timeout_s):
            await catalog.list_objects(name, PROBE_PREFIX, "", 1)
    except TimeoutError:
        return StoreFact(name, f"no answer within {timeout_s:g} s", "check its endpoint and the network")
    except PermissionDenied as error:
        return StoreFact(name, error.message, error.remedy, may_list=False)
    except XferdError as error:
        return StoreFact(name, error.message, error.remedy or "see docs/objects.md")
    return StoreFact(name)


def check_stores(stores: Sequence[StoreFact]) -> Iterator[Check]:
    """Judge object stores."""
    for store in stores:
        if not store.may_list:
            remedy = "allow listing (s3:ListBucket) if clients are to list; reads and writes were not tried"
            yield Check("stores", CheckState.WARN, f"store {store.name}: {store.error}", remedy)
        elif store.error:
            yield Check("stores", CheckState.FAIL, f"store {store.name}: {store.error}", store.remedy)
        else:
            yield Check("stores", CheckState.OK, f"store {store.name} answers", "")
    if not stores:
        yield Check("stores", CheckState.OK, "no object stores are configured", "")


def check_storage(pools: Sequence[StorageInfo]) -> Iterator[Check]:
    """Judge storage pools."""
    for pool in pools:
        bad = False
        for directory in pool.directories:
            if directory.failure:
                bad = True
                found = f"pool {pool.pool}: {directory.path} takes no changes any more: {directory.failure}"
                yield Check("storage", CheckState.FAIL, found, "look at the disk, then restart the daemon")
        if pool.damaged_blocks:
            bad = True
            found = f"pool {pool.pool}: {pool.damaged_blocks} blocks are not what was sealed"
            remedy = "see storage_block_damaged in the log for where; write them again from another copy, or free them"
            yield Check("storage", CheckState.FAIL, found, remedy)
        if not bad:
            proven = f"{format_nbytes(pool.sealed_nbytes)} of {format_nbytes(pool.extents_nbytes)} proven"
            yield Check("storage", CheckState.OK, f"pool {pool.pool}: {proven}", "")
    if not pools:
        yield Check("storage", CheckState.OK, "no storage pools are configured", "")
