"""Wire form of objects in stores, and of what is asked about files and objects; part of ``wire.py``."""

from __future__ import annotations

from xferd.api import types as t
from xferd.api._wire_core import access_from_wire, build, enum_to_wire, error_from_detail, error_to_detail, text
from xferd.api.proto import xferd_v1_pb2 as pb


def register_object_to_message(request: t.RegisterObjectRequest) -> pb.RegisterObjectRequest:
    """Return the wire form."""
    return build(
        pb.RegisterObjectRequest,
        store=request.store,
        key=request.key,
        nbytes=request.nbytes,
        writable=request.writable,
        create=request.create,
        access=enum_to_wire(request.access),
        label=request.label,
    )


def register_object_from_message(message: pb.RegisterObjectRequest) -> t.RegisterObjectRequest:
    """Return the request."""
    return t.RegisterObjectRequest(
        store=message.store,
        key=message.key,
        nbytes=message.nbytes,
        writable=message.writable,
        create=message.create,
        access=access_from_wire(message.access),
        label=message.label,
    )


def query_item_to_message(item: t.QueryItem) -> pb.QueryItem:
    """Return the wire form."""
    return build(pb.QueryItem, path=item.path, store=item.store, key=item.key)


def query_item_from_message(message: pb.QueryItem) -> t.QueryItem:
    """Return the item."""
    return t.QueryItem(message.path, message.store, message.key)


def query_result_to_message(result: t.QueryResult) -> pb.QueryResult:
    """Return the wire form."""
    return build(
        pb.QueryResult,
        exists=result.exists,
        nbytes=result.nbytes,
        modified_at=result.modified_at,
        etag=text(result.etag),
        error=None if result.error is None else error_to_detail(result.error),
    )


def query_result_from_message(message: pb.QueryResult) -> t.QueryResult:
    """Return the record."""
    error = error_from_detail(message.error) if message.HasField("error") else None
    return t.QueryResult(message.exists, message.nbytes, message.modified_at, message.etag, error)


def object_query_to_message(query: t.ObjectQuery) -> pb.ListObjectsRequest:
    """Return the wire form."""
    return build(pb.ListObjectsRequest, store=query.store, prefix=query.prefix, after=query.after, limit=query.limit)


def object_query_from_message(message: pb.ListObjectsRequest) -> t.ObjectQuery:
    """Return the query."""
    return t.ObjectQuery(message.store, message.prefix, message.after, message.limit)


def object_page_to_message(page: t.ObjectPage) -> pb.ObjectPage:
    """Return the wire form."""
    objects = [
        pb.ObjectEntry(key=text(entry.key), nbytes=entry.nbytes, modified_at=entry.modified_at, etag=text(entry.etag))
        for entry in page.objects
    ]
    return pb.ObjectPage(objects=objects, next=text(page.next))


def object_page_from_message(message: pb.ObjectPage) -> t.ObjectPage:
    """Return the record."""
    objects = tuple(t.ObjectEntry(entry.key, entry.nbytes, entry.modified_at, entry.etag) for entry in message.objects)
    return t.ObjectPage(objects, message.next)
