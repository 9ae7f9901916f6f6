"""Tables are aligned, fit a narrow terminal, have no colours in a pipe; JSON is what the REST face answers."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.text import Text

from xferd.api import types as t
from xferd.api.errors import PeerLost
from xferd.api.rest import _answers
from xferd.api.rest._shapes import shape_of
from xferd.clients.ctl import _tables
from xferd.clients.ctl._documents import document
from xferd.clients.ctl._output import Output

if TYPE_CHECKING:
    from rich.console import RenderableType

NOW = 1_700_000_100.0
HOPS = (
    t.Hop("posix", "FILE@a", "staging@a", "no backend reaches both ends"),
    t.Hop("tcp", "staging@a", "regions@b", "why"),
)
NODE = t.NodeInfo(
    "a",
    "1f",
    1 << 60,
    "0.1.0",
    ("tcp://127.0.0.1:7001",),
    ("local", "tcp"),
    (t.MemoryKind.DRAM,),
    ("prefill",),
    NOW - 95,
)
STATUS = t.NodeStatus(NODE, True, True, "", False, 1, 2, 0, 5, 1, 0, 3 << 30, 95.0)
POOL = t.PoolInfo("host", t.MemoryKind.DRAM, 256 << 20, 64 << 20, 192 << 20, 96 << 20, 0.5, 3, 128 << 20, 1, True)
SESSION = t.SessionInfo(t.SessionId("s1"), "prefill", t.Transport.SOCKET, 4711, 1000, NOW - 60, 0.0, 2, 8 << 20, 1, 4)
REST_SESSION = t.SessionInfo(t.SessionId("s2"), "curl", t.Transport.REST, 0, 0, NOW - 60, NOW + 30, 0, 0, 0, 0)
PEER = t.PeerInfo(NODE, t.PeerState.SUSPECT, "no answer", NOW - 5, 2, 1 << 20, 0)
REGION = t.RegionInfo(
    t.RegionId((3 << 32) | 1), "a", 1 << 60, t.MemoryKind.DRAM, t.RegionSource.POOL, 0, 4096, "prefill",
    t.Access.READ_WRITE, True, "kv\x1b[2J", "host", 8192,
)  # fmt: skip
BACKEND = t.BackendInfo("posix", ("DRAM>FILE", "FILE>DRAM"), 1 << 20, 12, 0, 1, 2)
ROUTE = t.RouteCost("tcp", "DRAM", "remote", "b", 65536, 1048575, 2e9, 1.4, 12, 3.0, 2, 1.5, "move_failed: reset")
TELEMETRY = t.Telemetry(NOW - 4, NOW - 4, NOW - 3, NOW - 2, 0.001, 0.5, 1 << 30, 1 << 29, 2048, 1025, 128, 1, HOPS)
FAILED = t.TransferStatus(
    t.TransferId("f00d"), "k", t.TransferOp.READ, t.TransferState.FAILED, t.Priority.HIGH, "c1", "a", "b", "prefill",
    PeerLost("node b went away", remedy="wait", routes_tried=("tcp: reset",)), TELEMETRY,
)  # fmt: skip
GPU = t.DeviceInfo(0, b"\x01" * 16, "A100", "cuda", "", 80 << 30, 64 << 30, 3, 1, 64 << 20, 5 << 30, 0.25, 1.5)
NO_GPU = t.DeviceInfo(1, b"", "", "cuda", "no such GPU", 0, 0, 0, 0, 0, 0, 0.0, 0.0)
HOLD = t.HoldInfo("region", "7", "s1", "POOL 4096 bytes", NOW - 7200, 0.0)
EXPLANATION = t.Explanation(
    HOPS, ("local: cannot move file to remote", "posix+tcp: through staging memory"), 3, 6, 4096
)
ESTIMATE = t.Estimate(0.0123, 2.5e9, "measured", HOPS)

VIEWS: dict[str, tuple[object, RenderableType]] = {
    "status": (STATUS, _tables.status(STATUS)),
    "pools": ({"pools": [POOL]}, _tables.pools([POOL])),
    "devices": ({"devices": [GPU]}, _tables.devices([GPU])),
    "sessions": ({"sessions": [SESSION]}, _tables.sessions([SESSION, REST_SESSION], NOW)),
    "peers": ({"peers": [PEER]}, _tables.peers([PEER], NOW)),
    "regions": ({"regions": [REGION]}, _tables.regions([REGION])),
    "backends": ({"backends": [BACKEND]}, _tables.backends([BACKEND])),
    "routes": ({"routes": [ROUTE]}, _tables.routes([ROUTE])),
    "transfers": ({"transfers": [FAILED]}, _tables.transfers([FAILED], NOW)),
    "holds": ({"holds": [HOLD]}, _tables.holds([HOLD], NOW)),
    "explain": (EXPLANATION, _tables.explanation(EXPLANATION)),
    "estimate": (ESTIMATE, _tables.estimate(ESTIMATE)),
}


def shown(view: RenderableType, *, width: int | None = None) -> str:
    out = io.StringIO()
    Output(is_json=False, stdout=out, stderr=io.StringIO(), width=width).show(None, lambda: view)
    return out.getvalue()


def test_pools_are_aligned_under_their_heads() -> None:
    assert shown(_tables.pools([POOL]), width=120) == (
        "POOL  KIND     SIZE      USED  USED%     FREE   LARGEST  FRAG     PEAK  REGIONS  FAILED  HUGE\n"
        "host  DRAM  256 MiB  64.0 MiB    25%  192 MiB  96.0 MiB  0.50  128 MiB        3       1   0 B\n"
    )


def test_pools_of_gpus_say_which_and_what_is_wrong() -> None:
    vram = replace(POOL, name="vram", kind=t.MemoryKind.VRAM, device=1, reason="no room")
    head, host, gpu = shown(_tables.pools([POOL, vram]), width=150).splitlines()
    assert head.endswith("HUGE  REASON")
    assert (gpu.split()[:2], gpu[head.index("REASON") :]) == (["vram", "VRAM(1)"], "no room")
    assert len(host) <= len(gpu)


def test_gpus_are_aligned_under_their_heads() -> None:
    head, good, bad = shown(_tables.devices([GPU, NO_GPU]), width=150).splitlines()
    for line, state in ((good, "READY"), (bad, "no such GPU")):
        assert line[head.index("STATE") :] == state
    sizes = ["80.0", "GiB", "64.0", "GiB", "3", "1", "64.0", "MiB", "5.00", "GiB", "250", "ms", "1.5", "s"]
    assert good[: head.index("STATE")].split() == ["0", "A100", "cuda", *sizes]
    for column in ("MEMORY", "FREE", "WORKERS", "PINNED", "MOVED"):
        end = head.index(column) + len(column)
        assert good[end - 1] != " ", column


def test_the_status_is_a_block_of_names_and_values() -> None:
    lines = shown(_tables.status(STATUS), width=100).splitlines()
    assert lines[:3] == ["node       a", "state      READY", "version    0.1.0"]
    assert "transfers  0 active, 5 done, 1 failed, 0 cancelled" in lines
    assert "moved      3.00 GiB" in lines


def test_bytes_of_a_read_pass_from_the_remote_node() -> None:
    row = shown(_tables.transfers([FAILED], NOW)).splitlines()[1]
    assert row.split() == [
        "f00d", "READ", "FAILED", "b>a", "prefill", "512", "MiB", "1.00", "GiB", "1.07", "GB/s", "4.0", "s",
        "posix", "+", "tcp", "node", "b", "went", "away",
    ]  # fmt: skip


def test_sessions_without_a_process_show_none() -> None:
    socket, rest = shown(_tables.sessions([SESSION, REST_SESSION], NOW)).splitlines()[1:]
    assert socket.split()[:6] == ["s1", "prefill", "socket", "4711", "1000", "1m"]
    assert rest.split()[:5] == ["s2", "curl", "rest", "-", "-"]
    assert "in 30.0 s" in rest


def test_a_route_says_how_fast_how_sure_and_what_failed() -> None:
    failed = t.RouteCost("local", "DRAM", "DRAM", "", 0, 0, 0.0, 1.0, 0, 0.0, 1, 0.0, "x")
    known, broken = shown(_tables.routes([ROUTE, failed]), width=160).splitlines()[1:]
    assert known.split()[:8] == ["tcp", "DRAM>remote", "b", "64.0", "KiB", "1.00", "MiB", "2.00"]
    assert known.endswith("failed 2 x, last for 1.5 s: move_failed: reset")
    assert broken.split() == ["local", "DRAM>DRAM", "-", "-", "-", "-", "-", "0", "-", "failed", "1", "x:", "x"]


def test_a_label_cannot_clear_the_screen() -> None:
    text = shown(_tables.regions([REGION]))
    assert r"kv\x1b[2J" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("name", VIEWS)
def test_in_a_pipe_there_are_no_colours_no_wrapping_and_no_trailing_blanks(name: str) -> None:
    text = shown(VIEWS[name][1])
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    if name not in ("status", "sessions", "explain", "estimate"):
        assert len(text.splitlines()) == 2, "one head and one row"


@pytest.mark.parametrize("name", VIEWS)
def test_a_narrow_terminal_gets_no_longer_lines(name: str) -> None:
    assert max(len(line) for line in shown(VIEWS[name][1], width=100).splitlines()) <= 100


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (STATUS, STATUS),
        ({"pools": [POOL]}, _answers.PoolList((POOL,))),
        ({"devices": [GPU]}, _answers.DeviceList((GPU,))),
        ({"sessions": [SESSION]}, _answers.SessionList((SESSION,))),
        ({"agents": [{"address": "x@a", "node": "a"}]}, _answers.AgentList((_answers.Agent("x@a", "a"),))),
        ({"peers": [PEER]}, _answers.PeerList((PEER,))),
        ({"backends": [BACKEND]}, _answers.BackendList((BACKEND,))),
        ({"routes": [ROUTE]}, _answers.RouteList((ROUTE,))),
        ({"transfers": [FAILED]}, _answers.TransferList((FAILED,))),
        ({"holds": [HOLD]}, _answers.HoldList((HOLD,))),
        (t.RegionListing("a", 1 << 60, (REGION,)), t.RegionListing("a", 1 << 60, (REGION,))),
        ({"toml": "x = 1"}, _answers.ConfigDocument("x = 1")),
        ({"drained": True, "transfers_left": 0}, _answers.Drained(True, 0)),
        ({"level": "info", "previous": "debug"}, _answers.LogLevel("info", "debug")),
        (FAILED, FAILED),
        (EXPLANATION, EXPLANATION),
        (ESTIMATE, ESTIMATE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_json_is_the_document_of_the_rest_face(mine: object, theirs: object) -> None:
    assert document(mine) == shape_of(type(theirs)).encode(theirs)


def test_json_is_one_document_and_makes_no_table() -> None:
    out = io.StringIO()

    def no_table() -> RenderableType:
        raise AssertionError("a table was made")

    Output(is_json=True, stdout=out, stderr=io.StringIO()).show({"regions": [REGION]}, no_table)
    assert json.loads(out.getvalue())["regions"][0]["id"] == str((3 << 32) | 1)
    assert "\x1b" not in out.getvalue()


def test_a_copy_is_summed_up_in_a_line() -> None:
    line = _tables.copied(FAILED, "file:a", "region:1@b")
    assert line == f"file:a > region:1@b: failed after {1 << 29} of {1 << 30} bytes"
    assert shown(Text(line)) == line + "\n"
