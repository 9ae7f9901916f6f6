"""What users import and run: the async and the sync client, the command line, demos."""

from xferd.api.descriptors import DescriptorList, PreparedRef, Run
from xferd.api.types import Access, Notification, Priority, TransferOp, TransferState, TransferStatus
from xferd.clients.admin import AdminConnection
from xferd.clients.aio import AsyncClient, AsyncPreparedList, AsyncRegion, AsyncTransfer
from xferd.clients.sync import Client, PreparedList, Region, Transfer

__all__ = [
    # blocking
    "Client",
    "PreparedList",
    "Region",
    "Transfer",
    # awaited
    "AsyncClient",
    "AsyncPreparedList",
    "AsyncRegion",
    "AsyncTransfer",
    # operators
    "AdminConnection",
    # values of the contract
    "Access",
    "DescriptorList",
    "Notification",
    "PreparedRef",
    "Priority",
    "Run",
    "TransferOp",
    "TransferState",
    "TransferStatus",
]
