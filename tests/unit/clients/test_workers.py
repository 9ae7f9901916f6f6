"""A worker answers by name, in order, and its end is noticed."""

from io import BytesIO

import pytest

from xferd.clients.workers import Worker, WorkerFailed

pytestmark = pytest.mark.slow  # each starts an interpreter


def test_a_worker_keeps_its_object_between_calls():
    with Worker("buffer", BytesIO) as worker:
        worker.begin("write", b"key")
        worker.begin("write", b"value")
        assert [worker.result(), worker.result()] == [3, 5]
        assert worker.call("getvalue") == b"keyvalue"


def test_a_worker_that_raises_ends_and_says_so(capfd):
    with (
        pytest.raises(WorkerFailed, match="the buffer process ended with exit status 1"),
        Worker("buffer", BytesIO) as w,
    ):
        w.call("write", "not bytes")
    assert "TypeError" in capfd.readouterr().err
