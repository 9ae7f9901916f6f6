"""The small parts of the object backend: budget, keys, digests, options, credentials, and errors of obstore."""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
from datetime import UTC, datetime

import numpy as np
import obstore.exceptions as oe
import pytest
from hypothesis import given, strategies as st
from pydantic import ValidationError

from xferd.api.errors import (
    ConfigError,
    IntegrityError,
    InvalidArgument,
    MoveFailed,
    NotFound,
    Overloaded,
    PermissionDenied,
    ShortTransfer,
    Stale,
    Unauthenticated,
    Unsupported,
)
from xferd.plugins.object.budget import ByteBudget
from xferd.plugins.object.credentials import s3_provider
from xferd.plugins.object.digests import LEAF_NBYTES, LeafHasher, WholeCheck, attribute_of, leaves_of
from xferd.plugins.object.faults import StoreFault, translate
from xferd.plugins.object.keys import check_key, check_prefix
from xferd.plugins.object.options import ObjectOptions, StoreOptions
from xferd.plugins.vectored import iov_of

MIB = 1 << 20

# ------------------------------------------------------------------------------------------ budget


async def test_budget_waits_in_order_and_never_passes_its_limit():
    """A large request is not passed over by small ones that came later."""
    budget, order = ByteBudget(10), []

    async def hold(name, nbytes, gate):
        async with budget.lease(nbytes):
            order.append(name)
            assert budget.used_nbytes <= 10
            await gate.wait()

    gates = [asyncio.Event() for _ in range(4)]
    tasks = [
        asyncio.create_task(hold(name, nbytes, gate))
        for name, nbytes, gate in zip("abcd", (6, 10, 1, 99), gates, strict=True)
    ]
    await asyncio.sleep(0)
    assert order == ["a"]
    for n, gate in enumerate(gates):
        gate.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == list("abcd"[: n + 2])
    await asyncio.gather(*tasks)
    assert (budget.used_nbytes, budget.peak_nbytes) == (0, 10)


async def test_cancelled_waiters_hold_nothing():
    """Cancelled before or after it was granted, a waiter gives back what it has, and the next is served."""
    budget = ByteBudget(10)
    taken = await budget.take(10)
    waiting = [asyncio.create_task(budget.take(5)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    budget.give_back(taken)  # grants the second and the third
    waiting[1].cancel()
    await asyncio.wait(waiting)
    assert [task.cancelled() for task in waiting] == [True, True, False]
    assert budget.used_nbytes == 5
    budget.give_back(5)
    assert "0 of 10" in repr(budget)


async def test_cancelled_and_served_in_one_step():
    """A waiter whose task has been cancelled and has not run yet is passed over."""
    budget = ByteBudget(10)
    taken = await budget.take(10)
    waiting = [asyncio.create_task(budget.take(10)) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    budget.give_back(taken)
    await asyncio.wait(waiting)
    assert [task.cancelled() for task in waiting] == [True, False]
    assert budget.used_nbytes == 10


# ------------------------------------------------------------------------------------------ keys


@given(st.text())
def test_a_key_that_is_taken_is_its_own_path(key):
    """What passes is not changed by splitting it into segments and joining them, nor by normalising it as a path."""
    with contextlib.suppress(InvalidArgument):
        check_key(key)
        _check_taken(key)


def _check_taken(key):
    assert 0 < len(key.encode()) <= 1024
    assert posixpath.normpath("/root/" + key) == "/root/" + key
    assert key.isprintable() or any(ord(c) > 127 for c in key)


def test_prefixes():
    """A prefix may end with a slash and be empty, and is else a key."""
    assert check_prefix("") == ""
    assert check_prefix("a/") == "a/"
    for prefix in ("/", "a//", "../", "\0"):
        with pytest.raises(InvalidArgument):
            check_prefix(prefix)


# ------------------------------------------------------------------------------------------ digests


@pytest.mark.slow
@given(st.lists(st.integers(1, 2 * MIB), min_size=1, max_size=5))
def test_digests_do_not_depend_on_pieces(sizes):
    """Bytes that come in pieces have the digests that they have at once."""
    data = np.random.default_rng(2).integers(0, 255, sum(sizes), dtype=np.uint8)
    hasher, at = LeafHasher(), 0
    for size in sizes:
        hasher.update(data[at : at + size])
        at += size
    assert np.array_equal(hasher.leaves(), leaves_of(iov_of(data)))


@pytest.mark.parametrize("nbytes", [1, LEAF_NBYTES, 3 * LEAF_NBYTES + 17])
def test_a_flipped_bit_is_found_in_any_order_of_parts(nbytes):
    """Parts may come in any order; one that is missing, or cut elsewhere, verifies nothing."""
    data = np.random.default_rng(3).integers(0, 255, nbytes, dtype=np.uint8)
    attributes = attribute_of(leaves_of(iov_of(data)))

    def check(data, starts, attributes=attributes):
        found = WholeCheck("object 'k' of store 's'", nbytes)
        for start in starts:
            stop = min(start + LEAF_NBYTES, nbytes)
            assert found.wants(start, stop)
            found.add(start, leaves_of(iov_of(data[start:stop])), attributes)
        return found

    starts = list(range(0, nbytes, LEAF_NBYTES))
    assert check(data, reversed(starts)).verify()
    assert not check(data, starts[1:]).verify()
    assert not check(data, starts, {}).verify()
    assert not check(data, starts, {"xferdxxh3": "4096:00"}).verify()
    assert not WholeCheck("k", nbytes + LEAF_NBYTES).wants(1, LEAF_NBYTES)
    data[-1] ^= 1
    with pytest.raises(IntegrityError, match="'k' of store 's'"):
        check(data, starts).verify()


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({"read_memory": "1MiB", "read_range": "2MiB"}, "read_range"),
        ({"write_memory": "20MiB", "part": "8MiB"}, "three parts"),
        ({"part": "4MiB"}, "greater than or equal"),
        ({"stores": {"a/b": {"url": "memory:///"}}}, "pattern"),
        ({"stores": {"a": {"url": "s3://b", "secret_access_key": "x"}}}, "Extra inputs"),
        ({"stores": {"a": {}}}, "Field required"),
        ({"stores": {"a": {"url": "memory:///", "max_retries": -1}}}, "greater than or equal"),
    ],
)
def test_options_that_do_not_go_together(section, why):
    with pytest.raises(ValidationError, match=why):
        ObjectOptions.model_validate(section)


@pytest.mark.parametrize(
    ("url", "bucket", "path"),
    [
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/a/b/", "bucket", "a/b"),
        ("gs://bucket/p", "bucket", "p"),
        ("file:///srv/kv", "", "/srv/kv"),
        ("memory:///", "", ""),
    ],
)
def test_urls(url, bucket, path):
    options = StoreOptions(url=url)
    assert (options.bucket, options.path) == (bucket, path)


# ------------------------------------------------------------------------------------------ credentials


def provider(tmp_path, text=None, environ=None, **options):
    path = tmp_path / "credentials"
    if text is not None:
        path.write_text(text)
    environ = {"AWS_SHARED_CREDENTIALS_FILE": str(path)} | (environ or {})
    return s3_provider(StoreOptions(url="s3://b", **options), environ)


def test_the_chain_of_credentials(tmp_path):
    """A named file or profile first, then the environment, then the shared file, then what obstore finds itself."""
    text = (
        "[default]\naws_access_key_id = A\naws_secret_access_key = a%b\n"
        "[other]\naws_access_key_id = B\naws_secret_access_key = b\naws_session_token = t\n"
    )
    found = provider(tmp_path, text)()
    assert (found["access_key_id"], found["secret_access_key"], found["token"]) == ("A", "a%b", None)
    assert found["expires_at"] > datetime.now(UTC)
    assert provider(tmp_path, profile="other")()["token"] == "t"
    assert provider(tmp_path, environ={"AWS_PROFILE": "other"})()["access_key_id"] == "B"
    assert provider(tmp_path, environ={"AWS_ACCESS_KEY_ID": "E"}) is None
    named = provider(tmp_path, environ={"AWS_ACCESS_KEY_ID": "E"}, credentials_file=str(tmp_path / "credentials"))
    assert named()["access_key_id"] == "A"
    (tmp_path / "credentials").unlink()
    assert provider(tmp_path) is None


@pytest.mark.parametrize("text", ["[default]\naws_access_key_id = A\n", "SEKRIT", "[default]\nSEKRIT", "[x]\na = b\n"])
def test_wrong_files_are_refused_without_their_text(tmp_path, text):
    path = tmp_path / "credentials"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        s3_provider(StoreOptions(url="s3://b", credentials_file=str(path)), {})
    assert "SEKRIT" not in str(caught.value)
    assert caught.value.__cause__ is None


# ------------------------------------------------------------------------------------------ errors


def server_error(status, code="", cls=oe.GenericError):
    return cls(
        f"Error performing GET http://h/b/k - Server returned non-2xx status code: {status} X: <Code>{code}</Code>"
    )


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (FileNotFoundError("Object at location k not found"), NotFound),
        (server_error(404, "NoSuchBucket", FileNotFoundError), NotFound),
        (server_error(412, "PreconditionFailed", oe.PreconditionError), Stale),
        (server_error(403, "AccessDenied", oe.PermissionDeniedError), PermissionDenied),
        (server_error(403, "InvalidAccessKeyId", oe.PermissionDeniedError), Unauthenticated),
        (server_error(400, "ExpiredToken"), Unauthenticated),
        (server_error(416, "InvalidRange"), ShortTransfer),
        (server_error(503, "SlowDown"), Overloaded),
        (server_error(429), Overloaded),
        (server_error(500, "InternalError"), MoveFailed),
        (oe.GenericError("error sending request kind: Timeout source: TimedOut"), MoveFailed),
        (oe.GenericError("Error performing PUT http://169.254.169.254/latest/api/token"), Unauthenticated),
        (oe.GenericError("Unable to open file: File name too long (os error 36)"), InvalidArgument),
        (oe.GenericError("something new"), MoveFailed),
        (NotImplementedError("Operation not yet implemented"), Unsupported),
        (ValueError("Could not parse path"), InvalidArgument),
        (PermissionError(13, "Permission denied"), PermissionDenied),
    ],
)
def test_errors_of_obstore_are_ours(exc, expected):
    """Each becomes one class, names request and store, and has a cause that holds nothing of the answer."""
    error = translate(exc, "get of 'k'", "kv")
    assert type(error) is expected
    assert "get of 'k' in store 'kv'" in error.message
    assert isinstance(error.__cause__, StoreFault)
    assert "http" not in str(error) + str(error.__cause__)
