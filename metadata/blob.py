"""A node's metadata as one blob, to be carried by any means and loaded elsewhere: its record and some regions.

All numbers are little-endian:

    offset  size  what
         0     4  magic, "XFMD"
         4     2  version, 1
         6     2  zero
         8     4  n: bytes of the node's record
        12     4  r: bytes of the regions
        16    16  BLAKE2b, digest size 16, of bytes 0 to 16 followed by bytes 32 to the end
        32     n  xferd.v1.Node
    32 + n     r  xferd.v1.RegionList

The checksum finds damage, not forgery: whoever may load a blob vouches for it. What a blob says about regions is
checked again by their node when they are used.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from xferd.api.errors import InvalidArgument, LimitExceeded
from xferd.api.proto import xferd_v1_pb2 as pb
from xferd.api.types import RegionListing
from xferd.api.wire import listing_from_message, listing_to_message, node_from_message, node_to_message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.api.types import NodeInfo, RegionInfo

MAGIC = b"XFMD"
VERSION = 1
MAX_BLOB_NBYTES = 4 << 20

_FRONT = struct.Struct("<4sHHII")
_DIGEST_NBYTES = 16
_HEADER_NBYTES = _FRONT.size + _DIGEST_NBYTES
_REMEDY = "export the metadata again and carry all of its bytes"


def encode_blob(node: NodeInfo, regions: Sequence[RegionInfo]) -> bytes:
    """Return the blob.

    Raises:
        LimitExceeded: it would be larger than ``MAX_BLOB_NBYTES``.
    """
    record = node_to_message(node).SerializeToString(deterministic=True)
    listing = listing_to_message(RegionListing(node.name, node.epoch, tuple(regions)))
    body = record + listing.SerializeToString(deterministic=True)
    if _HEADER_NBYTES + len(body) > MAX_BLOB_NBYTES:
        raise LimitExceeded(
            f"the metadata of {len(regions)} regions makes a blob of {_HEADER_NBYTES + len(body)} bytes",
            limit=f"{MAX_BLOB_NBYTES} bytes",
            remedy="export only the regions that the other side needs; it can ask for the rest",
        )
    front = _FRONT.pack(MAGIC, VERSION, 0, len(record), len(body) - len(record))
    return front + _digest(front, body) + body


def decode_blob(blob: bytes) -> tuple[NodeInfo, tuple[RegionInfo, ...]]:
    """Return the node and its regions.

    Raises:
        InvalidArgument: a wrong magic, version, size or checksum, or regions that are not the node's; the message
            says which.
    """
    if not _HEADER_NBYTES <= len(blob) <= MAX_BLOB_NBYTES:
        raise _invalid(f"the size is {len(blob)} bytes", f"{_HEADER_NBYTES} to {MAX_BLOB_NBYTES} bytes")
    front, body = blob[: _FRONT.size], blob[_HEADER_NBYTES:]
    magic, version, _, record_nbytes, listing_nbytes = _FRONT.unpack(front)
    if magic != MAGIC:
        raise _invalid(f"the magic is {magic!r}", repr(MAGIC))
    if version != VERSION:
        raise _invalid(f"the version is {version}", str(VERSION))
    if record_nbytes + listing_nbytes != len(body):
        raise _invalid(f"the size is {len(body)} bytes of body", f"{record_nbytes + listing_nbytes} by its header")
    if _digest(front, body) != blob[_FRONT.size : _HEADER_NBYTES]:
        raise _invalid("the checksum does not fit the bytes", "BLAKE2b over all but the checksum")
    return _checked(body[:record_nbytes], body[record_nbytes:])


def _checked(record: bytes, listing: bytes) -> tuple[NodeInfo, tuple[RegionInfo, ...]]:
    try:
        node = node_from_message(pb.Node.FromString(record))
        regions = listing_from_message(pb.RegionList.FromString(listing))
    except DecodeError as exc:
        raise _invalid(f"the content is no message: {exc}", "xferd.v1.Node, xferd.v1.RegionList") from exc
    if not node.name or not node.id or not node.epoch:
        raise _invalid("the content lacks the node's name, id or epoch", "all three")
    mine = (node.name, node.epoch)
    for owner in ((regions.node, regions.epoch), *((region.node, region.epoch) for region in regions.regions)):
        if owner != mine:
            raise _invalid(f"the content has regions of node {owner[0]!r} at epoch {owner[1]}", f"{mine}")
    return node, regions.regions


def _digest(front: bytes, body: bytes) -> bytes:
    return hashlib.blake2b(front + body, digest_size=_DIGEST_NBYTES).digest()


def _invalid(problem: str, limit: str) -> InvalidArgument:
    return InvalidArgument(f"this is no metadata blob that can be loaded: {problem}", limit=limit, remedy=_REMEDY)
