"""What users import and run: the async and the sync client, the command line, demos.

Names are imported when first used, so that ``xferctl --help`` does not wait for gRPC and numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xferd.api.descriptors import DescriptorList, PreparedRef, Run
    from xferd.api.types import Access, Notification, Priority, TransferOp, TransferState, TransferStatus
    from xferd.clients.admin import AdminConnection
    from xferd.clients.aio import AsyncClient, AsyncPreparedList, AsyncRegion, AsyncTransfer
    from xferd.clients.sync import Client, PreparedList, Region, Transfer

__all__ = [
    # values of the contract
    "Access",
    # operators
    "AdminConnection",
    # awaited
    "AsyncClient",
    "AsyncPreparedList",
    "AsyncRegion",
    "AsyncTransfer",
    # blocking
    "Client",
    "DescriptorList",
    "Notification",
    "PreparedList",
    "PreparedRef",
    "Priority",
    "Region",
    "Run",
    "Transfer",
    "TransferOp",
    "TransferState",
    "TransferStatus",
]

_HOMES = {
    "xferd.api.descriptors": ("DescriptorList", "PreparedRef", "Run"),
    "xferd.api.types": ("Access", "Notification", "Priority", "TransferOp", "TransferState", "TransferStatus"),
    "xferd.clients.admin": ("AdminConnection",),
    "xferd.clients.aio": ("AsyncClient", "AsyncPreparedList", "AsyncRegion", "AsyncTransfer"),
    "xferd.clients.sync": ("Client", "PreparedList", "Region", "Transfer"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
