"""One configured store: its requests, how many at once, and its errors as ours.

Requests are coroutines of obstore, whose own threads do the work; a cancelled one is dropped, and what it had received
is freed, never put anywhere. Tries again with jittered, growing pauses are obstore's, bounded by ``max_retries`` and
``retry_timeout``. Keys are checked here, so that no request goes out for one that means another object.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import heapq
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import obstore
from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store

from xferd.api.errors import ConfigError, InvalidArgument, NotFound, PermissionDenied, ShortTransfer
from xferd.plugins.base import ObjectFacts
from xferd.plugins.object.credentials import azure_config, environ_of_process, s3_provider
from xferd.plugins.object.direct import DirectGets
from xferd.plugins.object.faults import FAULTS, translate
from xferd.plugins.object.keys import check_key, check_prefix

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from obstore import AsyncWritableFile, Bytes, GetResult, ObjectMeta

    from xferd.plugins.object.direct import Ask
    from xferd.plugins.object.fetching import Received
    from xferd.plugins.object.options import StoreOptions

T = TypeVar("T")

DELETE_KEYS = 1000
"""Keys of one request: what S3 takes."""

LIST_KEYS = 1000
"""Entries of one page that is fetched; also what S3 gives."""

_BACKOFF = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2}


class Got(NamedTuple):
    """The bytes of a get, and what came with them, which costs something to look at."""

    data: Bytes
    result: GetResult

    @property
    def attributes(self) -> Mapping[str, str]:
        """The metadata of the object."""
        return self.result.attributes

    @property
    def object_nbytes(self) -> int:
        """The size of the whole object."""
        return self.result.meta["size"]


class Store:
    """A store by name. Used on one event loop.

    Attributes:
        has_attributes: whether objects can carry metadata of ours.
        direct: what puts ranges straight in place, where the store allows it.
    """

    def __init__(self, name: str, options: StoreOptions) -> None:
        self.name = name
        self.options = options
        self.has_attributes = options.scheme != "file"
        self._root = options.path if options.scheme == "file" else ""
        self._is_ordered = options.scheme not in ("file", "memory")
        self._client: Any = _client(name, options)
        self._slots = asyncio.Semaphore(options.max_concurrency)
        self.direct = DirectGets(self._client, options, self._slots) if DirectGets.is_for(options) else None

    def __repr__(self) -> str:
        return f"<Store {self.name} {self.options.scheme}>"

    async def aclose(self) -> None:
        """Break off what is received straight into its places; other requests go on, and place nothing."""
        if self.direct is not None:
            await self.direct.aclose()

    def check_writable(self) -> None:
        """Raise ``PermissionDenied`` where it is configured to be read only."""
        if self.options.read_only:
            raise PermissionDenied(
                f"store {self.name!r} is read only",
                limit="read_only = true",
                remedy=f"change backends.object.stores.{self.name}.read_only",
            )

    # ------------------------------------------------------------------------------------ requests

    async def find(self, key: str) -> ObjectFacts | None:
        """Return the facts of an object, None where there is none. A bucket that is absent looks the same to some."""
        await self._check(key)
        try:
            meta = await self._head(key)
        except FileNotFoundError:
            return None
        return _facts(meta)

    async def get(self, key: str, start: int, stop: int, etag: str) -> Got:
        """Return the bytes [start, stop) of an object, all of them, of the version that ``etag`` names ("" for any).

        Raises:
            Stale: the object has another version now.
            ShortTransfer: it ends before.
        """
        await self._check(key)
        options: dict[str, Any] = {"range": (start, stop)}
        if etag:
            options["if_match"] = etag

        async def fetch() -> Got:
            result = await obstore.get_async(self._client, key, options=options)  # type: ignore[arg-type]  # a TypedDict
            return Got(await result.bytes_async(), result)

        got = await self._request(f"get of {key!r}", fetch)
        if len(got.data) != stop - start:
            raise ShortTransfer(
                f"get of {key!r} in store {self.name!r}: {len(got.data)} of {stop - start} bytes from {start}",
                limit=f"{got.object_nbytes} bytes",
                remedy="register it again for its present size",
            )
        return got

    async def get_into(self, asks: Sequence[Ask]) -> list[Received | None]:
        """Fill the places of ranges; None for one that ``get`` has to be asked for, with some of it there perhaps.

        Cancelled, it returns when nothing is put anywhere any more.
        """
        if self.direct is None:
            return [None] * len(asks)
        for key in {ask.key for ask in asks}:
            await self._check(key)
        return await self.direct.get(asks)

    async def put(self, key: str, data: bytearray, attributes: dict[str, str]) -> str:
        """Write an object in one request, and return its etag. ``data`` must not change before this is over."""
        await self._check(key)
        result = await self._request(
            f"put of {key!r}",
            lambda: obstore.put_async(self._client, key, data, attributes=attributes or None, use_multipart=False),
        )
        return result["e_tag"] or ""

    async def writer(self, key: str, part_nbytes: int, parts: int, attributes: dict[str, str]) -> Writer:
        """Return a writer for an object of more than one part. Nothing is sent before its first write."""
        await self._check(key)
        opened = obstore.open_writer_async(
            self._client, key, buffer_size=part_nbytes, max_concurrency=parts, attributes=attributes or None
        )
        return Writer(self, key, opened)

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; absent ones are fine."""
        for key in keys:
            await self._check(key)
        for first in range(0, len(keys), DELETE_KEYS):
            await self._delete(keys[first : first + DELETE_KEYS])

    async def page(self, prefix: str, after: str, limit: int) -> tuple[ObjectFacts, ...]:
        """Return at most ``limit`` objects below a prefix and after a key, in key order."""
        check_prefix(prefix)
        if not self._is_ordered:
            found = heapq.nsmallest(limit, await self._walk(prefix, after, 0), key=lambda facts: facts.key)
        else:
            found = await self._walk(prefix, after, limit)
        return tuple(found)

    # ------------------------------------------------------------------------------------ internals

    async def _head(self, key: str) -> ObjectMeta:
        what = f"head of {key!r}"
        async with self._slots:
            try:
                return await obstore.head_async(self._client, key)
            except FileNotFoundError:
                raise
            except FAULTS as exc:
                error = translate(exc, what, self.name)
        raise error

    async def _delete(self, keys: Sequence[str]) -> None:
        """Delete by one request; a directory has no such thing, and minds what is absent."""
        what = f"delete of {keys[0]!r}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        if self._is_ordered:
            await self._request(what, lambda: obstore.delete_async(self._client, list(keys)))
            return
        for key in keys:
            with contextlib.suppress(NotFound):
                await self._request(f"delete of {key!r}", functools.partial(obstore.delete_async, self._client, key))

    async def _walk(self, prefix: str, after: str, limit: int) -> list[ObjectFacts]:
        """List below the directory of a prefix; 0 is no limit. obstore's own prefixes end at slashes."""
        directory = prefix.rpartition("/")[0]
        start = max(after, _before(prefix)) or None
        found: list[ObjectFacts] = []

        async def walk() -> None:
            stream = obstore.list(self._client, directory or None, offset=start, chunk_size=LIST_KEYS)
            async for page in stream:
                found.extend(_facts(meta) for meta in page if meta["path"].startswith(prefix) and meta["path"] > after)
                if limit and (len(found) >= limit or page[-1]["path"][: len(prefix)] > prefix):
                    return

        await self._request(f"list of {prefix!r}", walk)
        return found[:limit] if limit else found

    async def _request(self, what: str, call: Callable[[], Awaitable[T]]) -> T:
        """Make one request of the store, in turn, and translate its errors; the original is in no chain of them.

        ``call`` makes it: what obstore returns has begun already.
        """
        async with self._slots:
            try:
                return await call()
            except FAULTS as exc:
                error = translate(exc, what, self.name)
        raise error

    async def _check(self, key: str) -> None:
        check_key(key)
        if self._root:
            await asyncio.to_thread(self._check_inside, key)

    def _check_inside(self, key: str) -> None:
        """Refuse a key that a symlink below the root leads out by. Who may make symlinks there must be trusted."""
        root = os.path.realpath(self._root)
        try:
            place = os.path.realpath(Path(root, key))
        except (OSError, ValueError) as exc:
            raise InvalidArgument(f"object key {ascii(key)[:100]} is no path here", remedy="choose another") from exc
        if not place.startswith(root.rstrip("/") + "/"):
            raise PermissionDenied(
                f"object key {ascii(key)[:100]} leaves store {self.name!r} by a symlink",
                limit="keys below the store's directory",
                remedy="remove the symlink",
            )


class Writer:
    """An upload in parts. Bytes are copied as they are written, so that the caller's buffer is free afterwards.

    obstore keeps the upload's id to itself; so an upload can be aborted only by its writer, and only once the store has
    answered that it began. Whoever is cancelled inside ``write`` must therefore not leave before ``is_begun``.
    """

    def __init__(self, store: Store, key: str, opened: AsyncWritableFile) -> None:
        self._store = store
        self._key = key
        self._opened = opened

    async def write(self, data: bytearray) -> None:
        """Take the next bytes of the object; waits while as many parts as may be are under way."""
        await self._translated(self._opened.write(data))

    async def flush(self) -> None:
        """Wait until the store has every whole part."""
        await self._translated(self._opened.flush())

    async def close(self) -> None:
        """Send the rest and make the object visible. Not to be cancelled."""
        await self._translated(self._opened.close())

    async def abort(self) -> None:
        """Stop what is under way and have the store drop the parts."""
        await self._translated(self._opened.__aexit__(InterruptedError, None, None))

    async def _translated(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except FAULTS as exc:
            error = translate(exc, f"upload of {self._key!r}", self._store.name)
        raise error


def _client(name: str, options: StoreOptions) -> object:
    """Make obstore's client; nothing is sent.

    Raises:
        ConfigError: the section, or a file that it names, is wrong.
    """
    try:
        match options.scheme:
            case "memory":
                return MemoryStore()
            case "file":
                return LocalStore(options.path)
            case "gs":
                return GCSStore(options.bucket, prefix=options.path or None, **_common(options), config=_gcs(options))
            case "az":
                return AzureStore(
                    options.bucket, prefix=options.path or None, **_common(options), config=_azure(options)
                )
            case _:
                provider: Any = s3_provider(options, environ_of_process())
                return S3Store(
                    options.bucket,
                    prefix=options.path or None,
                    **_common(options),
                    config=_s3(options),
                    credential_provider=provider,
                )
    except ConfigError as exc:
        text, remedy = exc.message, exc.remedy
    except FAULTS as exc:
        text, remedy = translate(exc, "opening", name).message, "see docs/objects.md; a directory must be there already"
    raise ConfigError(f"backends.object.stores.{name}: {text}", remedy=remedy)


def _common(options: StoreOptions) -> dict[str, Any]:
    client: dict[str, object] = {
        "allow_http": options.allow_http,
        "connect_timeout": timedelta(seconds=options.connect_timeout),
        "timeout": timedelta(seconds=options.request_timeout),
        "pool_max_idle_per_host": str(options.max_concurrency),
    }
    if options.ca_file:
        client["root_certificate"] = Path(options.ca_file).read_bytes()
    retry = {
        "max_retries": options.max_retries,
        "retry_timeout": timedelta(seconds=options.retry_timeout),
        "backoff": _BACKOFF,
    }
    return {"client_options": client, "retry_config": retry}


def _s3(options: StoreOptions) -> Any:
    given = {"endpoint": options.endpoint, "region": options.region}
    config: dict[str, Any] = {key: value for key, value in given.items() if value}
    return config | {
        "virtual_hosted_style_request": options.virtual_hosted,
        "skip_signature": options.anonymous,
    }


def _gcs(options: StoreOptions) -> Any:
    config: dict[str, Any] = {"skip_signature": options.anonymous}
    if options.credentials_file:
        config["service_account"] = options.credentials_file
    if options.endpoint:
        config["base_url"] = options.endpoint
    return config


def _azure(options: StoreOptions) -> Any:
    config: dict[str, Any] = {"account_name": options.account, "skip_signature": options.anonymous}
    if options.endpoint:
        config["endpoint"] = options.endpoint
    return config | azure_config(options)


def _facts(meta: ObjectMeta) -> ObjectFacts:
    return ObjectFacts(meta["path"], meta["size"], meta["last_modified"].timestamp(), meta["e_tag"] or "")


def _before(prefix: str) -> str:
    """Return a key from which a listing may start so that nothing with the prefix is left out."""
    if not prefix or ord(prefix[-1]) <= ord("!"):
        return ""
    return prefix[:-1] + chr(ord(prefix[-1]) - 1)
