"""What users import and run: the async and the sync client, the command line, demos."""

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
