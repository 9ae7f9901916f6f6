"""Records as tables and blocks for people. Pure: the time is an argument, and nothing is printed here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from xferd.api.types import CheckState, MemoryKind, RegionSource, TransferState
from xferd.clients.ctl import _format as f

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from xferd.api import types as t

STYLES = {
    "DONE": "green",
    "READY": "green",
    "FAILED": "red",
    "GONE": "red",
    "SUSPECT": "yellow",
    "DRAINING": "yellow",
    "CANCELLED": "yellow",
    "RUNNING": "cyan",
    "POSTED": "cyan",
}
"""Colour of a cell that is exactly such a word."""

MARKS = {CheckState.OK: ("ok", "green"), CheckState.WARN: ("warn", "yellow"), CheckState.FAIL: ("FAIL", "bold red")}
"""How a check's state is shown: in words too, for pipes and for those who do not see colours."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a plain table; a column whose name begins with ">" is aligned to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        is_right = column.startswith(">")
        made.add_column(column.removeprefix(">"), justify="right" if is_right else "left", no_wrap=is_right)
    for row in rows:
        made.add_row(*(Text(f.printable(cell), STYLES.get(cell, "")) for cell in row))
    return made


def block(pairs: Iterable[tuple[str, str]]) -> Table:
    """Return names and values below each other."""
    made = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(name, Text(f.printable(value), STYLES.get(value, "")))
    return made


def status(info: t.NodeStatus) -> Table:
    """Return a node's health and counters."""
    node = info.node
    state = "DRAINING" if info.draining else "READY" if info.ready else "not ready"
    return block(
        [
            ("node", node.name),
            ("state", state),
            *([("reason", info.reason)] if info.reason else []),
            *([("live", "no: the event loop is stuck")] if not info.live else []),
            ("version", node.version),
            ("up", f"{f.duration(info.uptime_s)}, since {f.moment(node.started_at)}"),
            ("epoch", str(node.epoch)),
            ("addresses", ", ".join(node.addresses) or "-"),
            ("backends", ", ".join(node.backends)),
            ("sessions", str(info.sessions)),
            ("regions", str(info.regions)),
            ("transfers", _transfer_counts(info)),
            ("moved", f.nbytes(info.moved_nbytes)),
        ]
    )


def _transfer_counts(info: t.NodeStatus) -> str:
    return (
        f"{info.transfers_active} active, {info.transfers_done} done, "
        f"{info.transfers_failed} failed, {info.transfers_cancelled} cancelled"
    )


def pools(infos: Iterable[t.PoolInfo]) -> Table:
    """Return pools with how full they are."""
    columns: tuple[str, ...] = (
        *("POOL", "KIND", ">SIZE", ">USED", ">USED%", ">FREE", ">LARGEST", ">FRAG", ">PEAK", ">REGIONS", ">FAILED"),
        ">HUGE",
        "REASON",
    )
    infos = tuple(infos)
    if not any(pool.reason for pool in infos):
        columns = columns[:-1]
    return table(
        columns,
        (
            (
                pool.name,
                f"VRAM({pool.device})" if pool.kind is MemoryKind.VRAM else pool.kind.value,
                f.nbytes(pool.nbytes),
                f.nbytes(pool.used_nbytes),
                f.percent(pool.used_nbytes, pool.nbytes),
                f.nbytes(pool.free_nbytes),
                f.nbytes(pool.largest_free_nbytes),
                f"{pool.fragmentation:.2f}",
                f.nbytes(pool.peak_used_nbytes),
                str(pool.allocations),
                str(pool.failed_allocations),
                f.nbytes(pool.huge_nbytes),
                pool.reason,
            )[: len(columns)]
            for pool in infos
        ),
    )


def devices(infos: Iterable[t.DeviceInfo]) -> Table:
    """Return GPUs with their memory and what their workers did; the last column says why one cannot be used."""
    columns = (
        *(">GPU", "NAME", "DRIVER", ">MEMORY", ">FREE", ">WORKERS", ">RESTARTS", ">PINNED", ">MOVED", ">KERNELS"),
        *(">COPIES", "STATE"),
    )
    return table(
        columns,
        (
            (
                str(info.index),
                info.name or "-",
                info.driver,
                f.nbytes(info.total_nbytes),
                f.nbytes(info.free_nbytes),
                str(info.workers),
                str(info.worker_restarts),
                f.nbytes(info.pinned_nbytes),
                f.nbytes(info.moved_nbytes),
                f.duration(info.kernel_s),
                f.duration(info.copy_s),
                info.reason or "READY",
            )
            for info in infos
        ),
    )


def sessions(infos: Iterable[t.SessionInfo], now: float) -> Table:
    """Return who is attached and what it holds."""
    columns = (
        "SESSION",
        "AGENT",
        "VIA",
        ">PID",
        ">UID",
        ">AGE",
        ">EXPIRES",
        ">REGIONS",
        ">HELD",
        ">TRANSFERS",
        ">LISTS",
    )
    return table(
        columns,
        (
            (
                info.session,
                info.agent,
                info.transport.value,
                str(info.pid or "-"),
                str(info.uid) if info.pid else "-",
                f.age(info.opened_at, now),
                f"in {f.duration(max(info.expires_at - now, 0.0))}" if info.expires_at else "-",
                str(info.regions),
                f.nbytes(info.held_nbytes),
                str(info.transfers),
                str(info.prepared),
            )
            for info in infos
        ),
    )


def agents(pairs: Iterable[tuple[str, str]]) -> Table:
    """Return agents by (address, node)."""
    return table(("AGENT", "NODE"), pairs)


def peers(infos: Iterable[t.PeerInfo], now: float) -> Table:
    """Return other nodes as this one sees them."""
    columns = ("NODE", "STATE", ">FOR", "ADDRESS", ">LANES", ">SENT", ">RECEIVED", ">AGENTS", "REASON")
    return table(
        columns,
        (
            (
                peer.node.name,
                peer.state.value,
                f.age(peer.since, now),
                ", ".join(peer.node.addresses) or "-",
                str(peer.lanes),
                f.nbytes(peer.sent_nbytes),
                f.nbytes(peer.received_nbytes),
                str(len(peer.node.agents)),
                peer.reason,
            )
            for peer in infos
        ),
    )


def nodes(infos: Iterable[t.NodeInfo]) -> Table:
    """Return the records of nodes; a node that was not reached yet is known by name and address only."""
    columns = ("NODE", "VERSION", "SINCE", "ADDRESS", "BACKENDS", ">AGENTS", "STATE")
    return table(
        columns,
        (
            (
                node.name,
                node.version or "-",
                f.moment(node.started_at),
                ", ".join(node.addresses) or "-",
                ", ".join(node.backends) or "-",
                str(len(node.agents)),
                "not reached" if not node.epoch else "DRAINING" if node.draining else "",
            )
            for node in infos
        ),
    )


def checks(found: Iterable[t.Check]) -> Table:
    """Return what a look at the surroundings found, with what to do below each finding that is not OK."""
    made = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    made.add_column(no_wrap=True)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for check in found:
        mark, style = MARKS[check.state]
        made.add_row(Text(mark, style), f.printable(check.name), f.printable(check.finding))
        if check.remedy:
            made.add_row("", "", Text(f"> {f.printable(check.remedy)}", "bold"))
    return made


def peer_line(peer: t.PeerInfo) -> str:
    """Return a peer's state on one line, with the time since when it is so."""
    since = time.strftime("%H:%M:%S", time.localtime(peer.since))
    return f"{since}  {peer.node.name:20}  {peer.state.value:8}  {peer.reason}".rstrip()


def regions(infos: Iterable[t.RegionInfo]) -> Table:
    """Return regions; WHERE is the pool with the offset in it, or the path."""
    columns = ("REGION", "KIND", "SOURCE", ">SIZE", "AGENT", "ACCESS", "LABEL", "WHERE")
    return table(
        columns,
        (
            (
                str(info.id),
                info.kind.value,
                info.source.value,
                f.nbytes(info.nbytes),
                f"{info.agent}@{info.node}",
                str(info.access.name),
                info.label,
                f"{info.pool}+{info.pool_offset}" if info.source is RegionSource.POOL else info.path,
            )
            for info in infos
        ),
    )


def backends(infos: Iterable[t.BackendInfo]) -> Table:
    """Return backends with what they have moved."""
    columns = ("BACKEND", ">MOVED", ">CHUNKS", ">FAILURES", ">BUSY", "PAIRS")
    return table(
        columns,
        (
            (
                info.name,
                f.nbytes(info.moved_nbytes),
                str(info.chunks),
                str(info.failures),
                f"{info.busy}/{info.slots}",
                " ".join(info.pairs),
            )
            for info in infos
        ),
    )


def storage(infos: Iterable[t.StorageInfo], now: float) -> Group:
    """Return storage pools, each with its directories below it."""
    return Group(*(part for info in infos for part in (_storage_pool(info, now), _storage_directories(info))))


def _storage_pool(info: t.StorageInfo, now: float) -> Table:
    rate = f"at most {f.rate(info.scrub_bytes_per_s)}" if info.scrub_bytes_per_s else "off"
    last = f", last pass ended {f.age(info.scrub_pass_ended_at, now)} ago" if info.scrub_passes else ""
    proven = f"{f.nbytes(info.sealed_nbytes)} of {f.nbytes(info.extents_nbytes)}"
    return block(
        [
            ("pool", info.pool),
            ("extents", f"{info.extents}, {info.persistent_extents} persistent"),
            ("proven", f"{proven}, {f.percent(info.sealed_nbytes, info.extents_nbytes)}"),
            ("checksums", f"{info.checksum}, blocks of {f.nbytes(info.block_nbytes)}"),
            ("verified", f"{f.nbytes(info.verified_total_nbytes)}{', every read' if info.verify else ''}"),
            ("damage", f"{info.damaged_blocks} blocks, {info.mismatches} mismatches"),
            ("scrubber", f"{rate}, {info.scrub_passes} passes, {f.nbytes(info.scrubbed_total_nbytes)}{last}"),
        ]
    )


def _storage_directories(info: t.StorageInfo) -> Table:
    columns = ("DIRECTORY", ">SIZE", ">USED", ">WEIGHT", ">SLABS", ">EXTENTS", ">JOURNAL", "LAST STOP", ">TORN")
    return table(
        (*columns, "STATE"),
        (
            (
                each.path,
                f.nbytes(each.nbytes),
                f.nbytes(each.used_nbytes),
                f"{each.weight:g}",
                str(each.slabs),
                str(each.extents),
                f.nbytes(each.journal_nbytes),
                "in order" if each.was_clean else "crash",
                f.nbytes(each.torn_nbytes),
                each.failure or "ok",
            )
            for each in info.directories
        ),
    )


def routes(infos: Iterable[t.RouteCost]) -> Table:
    """Return what was learned of routes; FACTOR is measured over assumed time, and STATE says what failed lately."""
    columns = ("ROUTE", "WAY", "PEER", ">FROM", ">TO", ">RATE", ">FACTOR", ">MEASURED", ">AGO", "STATE")
    return table(
        columns,
        (
            (
                info.route,
                f"{info.source}>{info.target}",
                info.peer or "-",
                f.nbytes(info.min_nbytes) if info.measurements else "-",
                f.nbytes(info.max_nbytes + 1) if info.measurements else "-",
                f.rate(info.bytes_per_s) if info.measurements else "-",
                f"{info.factor:.2g}" if info.measurements else "-",
                str(info.measurements),
                f.duration(info.age_s) if info.measurements else "-",
                _route_state(info),
            )
            for info in infos
        ),
    )


def _route_state(info: t.RouteCost) -> str:
    if not info.failures:
        return "ok"
    last = f", last for {f.duration(info.retry_in_s)}" if info.retry_in_s else ""
    return f"failed {info.failures} x{last}: {info.last_error}"


def transfers(infos: Iterable[t.TransferStatus], now: float) -> Table:
    """Return transfers; WAY is the direction of the bytes, and ROUTE the backends that move them."""
    columns = ("TRANSFER", "OP", "STATE", "WAY", "AGENT", ">MOVED", ">OF", ">RATE", ">AGE", "ROUTE", "ERROR")
    return table(
        columns,
        (
            (
                info.id,
                info.op.value,
                info.state.value,
                way(info),
                info.agent,
                f.nbytes(info.telemetry.moved_nbytes),
                f.nbytes(info.telemetry.total_nbytes),
                mean_rate(info.telemetry),
                f.age(info.telemetry.created_at, now),
                route_names(info.telemetry.route),
                info.error.message if info.error else "",
            )
            for info in infos
        ),
    )


def way(info: t.TransferStatus) -> str:
    """Return the nodes of a transfer in the order in which bytes pass them."""
    ends = (info.local_node, info.remote_node)
    return ">".join(reversed(ends) if info.op.value == "READ" else ends)


def mean_rate(telemetry: t.Telemetry) -> str:
    """Return the mean rate while it moved; "-" before."""
    return f.rate(telemetry.moved_nbytes / telemetry.moving_s) if telemetry.moving_s > 0 else "-"


def route_names(route: Iterable[t.Hop]) -> str:
    """Return the backends of a route, in order."""
    return " + ".join(dict.fromkeys(hop.backend for hop in route)) or "-"


def holds(infos: Iterable[t.HoldInfo], now: float) -> Table:
    """Return what is held and until when; "-" under EXPIRES: until its owner goes."""
    return table(
        ("KIND", "WHAT", "OWNER", "REASON", ">FOR", ">EXPIRES"),
        (
            (
                info.kind,
                info.what,
                info.owner,
                info.reason,
                f.age(info.since, now),
                f"in {f.duration(max(info.expires_at - now, 0.0))}" if info.expires_at else "-",
            )
            for info in infos
        ),
    )


def explanation(info: t.Explanation) -> Table:
    """Return the route that would be taken, and what else was weighed."""
    return block(
        [
            *_hops(info.route),
            ("size", f"{f.nbytes(info.total_nbytes)} in {info.pieces} pieces, {info.chunks} chunks"),
            *(("considered" if not row else "", line) for row, line in enumerate(info.considered)),
        ]
    )


def estimate(info: t.Estimate) -> Table:
    """Return the expected cost."""
    return block(
        [
            ("time", f"{f.duration(info.duration_s)} ({info.basis})"),
            ("rate", f.rate(info.bytes_per_s)),
            *_hops(info.route),
        ]
    )


def _hops(route: Sequence[t.Hop]) -> list[tuple[str, str]]:
    return [
        (
            "route" if not row else "",
            f"{hop.backend}: {hop.source} > {hop.target}" + (f", {hop.reason}" if hop.reason else ""),
        )
        for row, hop in enumerate(route)
    ]


def copied(info: t.TransferStatus, source: str, target: str) -> str:
    """Return one line about a copy that has ended."""
    telemetry = info.telemetry
    if info.state is TransferState.DONE:
        return (
            f"{source} > {target}: {f.nbytes(telemetry.moved_nbytes)} in {f.duration(telemetry.moving_s)}, "
            f"{mean_rate(telemetry)}, by {route_names(telemetry.route)}"
        )
    count = f"{telemetry.moved_nbytes} of {telemetry.total_nbytes} bytes"
    return f"{source} > {target}: {info.state.value.lower()} after {count}"
