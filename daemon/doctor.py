"""What ``xferctl doctor`` says: pure checks over facts about the daemon's surroundings.

Each check takes the facts and yields what it found; nothing here looks at the machine, so that tests can feed any
machine. The facts are gathered in ``doctor_facts.py``. WARN is what works and will not under load, after a restart or
for some; FAIL is what does not work now.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xferd.api.types import Check, CheckState, PeerState
from xferd.api.units import format_nbytes
from xferd.daemon.doctor_storage import check_storage, check_stores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from xferd.api.types import DeviceInfo, PeerInfo, PoolInfo, StorageInfo
    from xferd.daemon.doctor_storage import StoreFact
    from xferd.metadata.base import LeaseView

OK, WARN, FAIL = CheckState.OK, CheckState.WARN, CheckState.FAIL

FDS_OF_A_SESSION = 3
"""Its socket, the pidfd of its process, its gRPC connection; files and memfds that it registers come on top."""

FDS_OF_THE_DAEMON = 192
"""Listeners, pools, run directory, the store, lanes to a few peers."""

FULL_FDS = 0.9
CLOCK_TOLERANCE_S = 2.0
"""etcd counts whole seconds, and our question took time."""

STAGING_WAITERS = 1
NAMED = 5
"""How many of many peers a finding names."""


@dataclass(frozen=True, slots=True)
class PathFact:
    """A path as it was found. ``kind``: "directory", "socket" or "file"; ``secret``: nobody else may read it."""

    name: str
    path: str
    kind: str
    error: str = ""
    mode: int = 0
    uid: int = 0
    is_accessible: bool = True
    secret: bool = False


@dataclass(frozen=True, slots=True)
class PortFact:
    """An address of ours that was called: ``error`` is "" where it answered. ``advertised``: not where we listen."""

    name: str
    address: str
    error: str = ""
    advertised: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """The daemon and its machine at one moment. Limits are None where there is none."""

    uid: int
    version: str
    refusal: str
    config_error: str
    config_changed: tuple[str, ...]
    store: str
    store_problem: str
    lease: LeaseView | None
    lease_error: str
    clock_step_s: float
    memlock_nbytes: int | None
    max_fds: int | None
    open_fds: int
    max_sessions: int
    ptrace_scope: int | None
    huge_pool_nbytes: int
    huge_page_nbytes: int
    huge_pages_total: int
    huge_pages_free: int
    pools: tuple[PoolInfo, ...]
    storage: tuple[StorageInfo, ...]
    stores: tuple[StoreFact, ...]
    devices: tuple[DeviceInfo, ...]
    staging_slots: int
    staging_free: int
    staging_waiting: int
    paths: tuple[PathFact, ...]
    ports: tuple[PortFact, ...]
    peers: tuple[PeerInfo, ...]


def diagnose(facts: Facts) -> list[Check]:
    """Return every check, in the order in which a person would look."""
    return [check for look in _CHECKS for check in look(facts)]


def _ok(name: str, finding: str) -> Check:
    return Check(name, OK, finding, "")


def _node(facts: Facts) -> Iterator[Check]:
    if facts.refusal:
        yield Check("node", WARN, f"takes no new work: {facts.refusal}", "xferctl undrain, or wait for its restart")
    else:
        yield _ok("node", f"takes new work, version {facts.version}")


def _config(facts: Facts) -> Iterator[Check]:
    if facts.config_error:
        remedy = "correct it before the next restart: `xferd --validate-config` says the same"
        yield Check("config", FAIL, f"the configuration in its file does not load: {facts.config_error}", remedy)
    elif facts.config_changed:
        found = f"the file differs from what is in force: {_some(facts.config_changed)}"
        yield Check("config", WARN, found, "reload the daemon (SIGHUP); what needs a restart is logged then")
    else:
        yield _ok("config", "valid, and the one in force")


def _store(facts: Facts) -> Iterator[Check]:
    name = "etcd" if facts.store == "etcd" else "store"
    if facts.store_problem:
        remedy = (
            "check that etcd runs and has a leader (etcdctl endpoint status), and metadata.etcd.endpoints"
            if facts.store == "etcd"
            else "see the daemon's log"
        )
        yield Check(name, FAIL, facts.store_problem, remedy)
    else:
        yield _ok(name, "answers, and has this node's record" if facts.store == "etcd" else f"{facts.store}: no etcd")


def _clock(facts: Facts) -> Iterator[Check]:
    if abs(facts.clock_step_s) > CLOCK_TOLERANCE_S:
        yield Check(
            "clock",
            WARN,
            f"the wall clock was set by {facts.clock_step_s:+.1f} s since the daemon started",
            "let one time service keep it (chronyc tracking, timedatectl): times in logs and records are off",
        )
    lease = facts.lease
    if facts.lease_error:
        yield Check("lease", WARN, f"etcd was not asked about the lease: {facts.lease_error}", "see the check of etcd")
    elif lease is None:
        why = "no lease is held now" if facts.store == "etcd" else "the store has no leases"
        yield _ok("lease", f"not applicable: {why}")
    else:
        yield _lease(lease)
    if abs(facts.clock_step_s) <= CLOCK_TOLERANCE_S:
        yield _ok("clock", "not set since the daemon started")


def _lease(lease: LeaseView) -> Check:
    ahead_s = lease.ours_s - lease.theirs_s
    seen = f"{lease.ours_s:.1f} s of {lease.ttl_s:g} s left by our clock, {lease.theirs_s:g} s by etcd's"
    remedy = "check the time service of this machine and of etcd's members, and that none of them was suspended"
    if lease.theirs_s < 0 or ahead_s > lease.ttl_s / 3 + 1:
        return Check("lease", FAIL, f"{seen}: etcd ends it before we renew it", remedy)
    if ahead_s > CLOCK_TOLERANCE_S:
        return Check("lease", WARN, f"{seen}: etcd's clock is ahead", remedy)
    if -ahead_s > CLOCK_TOLERANCE_S:
        return Check("lease", WARN, f"{seen}: etcd's clock is behind, or its leader has just changed", remedy)
    return _ok("lease", seen)


def _memlock(facts: Facts) -> Iterator[Check]:
    limit, needed = facts.memlock_nbytes, sum(pool.nbytes for pool in facts.pools)
    if limit is None:
        yield _ok("memlock", "unlimited")
    elif limit < needed and facts.huge_pool_nbytes:
        yield Check(
            "memlock",
            WARN,
            f"{format_nbytes(limit)} may be locked, and pools have {format_nbytes(needed)}, some in huge pages",
            "LimitMEMLOCK=infinity in the unit, or ulimit -l unlimited",
        )
    else:
        yield _ok("memlock", f"{format_nbytes(limit)}; pools of {format_nbytes(needed)} are not locked")


def _fds(facts: Facts) -> Iterator[Check]:
    limit, needed = facts.max_fds, facts.max_sessions * FDS_OF_A_SESSION + FDS_OF_THE_DAEMON
    remedy = "LimitNOFILE=1048576 in the unit, or ulimit -n; or lower sessions.max_sessions"
    if limit is None:
        yield _ok("fds", f"{facts.open_fds} open, unlimited")
    elif facts.open_fds > limit * FULL_FDS:
        yield Check("fds", FAIL, f"{facts.open_fds} of {limit} file descriptors are open", remedy)
    elif limit < needed:
        found = f"{limit} file descriptors, and {facts.max_sessions} sessions need {needed}"
        yield Check("fds", WARN, found, remedy)
    else:
        yield _ok("fds", f"{facts.open_fds} of {limit} open, {needed} needed for {facts.max_sessions} sessions")


def _ptrace(facts: Facts) -> Iterator[Check]:
    scope = facts.ptrace_scope
    if scope is None:
        yield _ok("ptrace", "not restricted: no Yama")
    elif scope <= 0:
        yield _ok("ptrace", "not restricted: scope 0")
    elif scope == 1:
        yield _ok("ptrace", "scope 1: the client library lets the daemon in by itself")
    else:
        # Root's daemon has CAP_SYS_PTRACE where scope 2 asks for it; scope 3 lets nobody in.
        works = scope == 2 and facts.uid == 0
        found = f"scope {scope}: " + (
            "only root's daemon, as this one, reaches" if works else "the daemon cannot reach"
        )
        remedy = "sysctl kernel.yama.ptrace_scope=1" + (" and a reboot: 3 stays until then" if scope == 3 else "")
        state = OK if works else WARN
        yield Check("ptrace", state, f"{found} private memory of clients", "" if works else f"{remedy}, or use pools")


def _huge(facts: Facts) -> Iterator[Check]:
    have = f"{facts.huge_pages_free} of {facts.huge_pages_total} huge pages are free"
    refused = [pool for pool in facts.pools if pool.huge_refusal]
    for pool in refused:
        remedy = "Linux 6.1 or newer with transparent huge pages, or set pages aside and use huge_pages = true"
        yield Check("huge-pages", WARN, f"pool {pool.name} copies at half speed: {pool.huge_refusal}", remedy)
    if not facts.huge_pool_nbytes:
        made = sum(pool.huge_nbytes for pool in facts.pools)
        if not refused:
            found = f"no pool uses them; {format_nbytes(made)} of small pages were made huge"
            yield _ok("huge-pages", f"{found}; {have}")
        return
    needed = -(-facts.huge_pool_nbytes // max(1, facts.huge_page_nbytes))
    if facts.huge_pages_total < needed:
        found = f"pools need {needed}, and the machine has {facts.huge_pages_total}: they cannot be made again"
        yield Check("huge-pages", FAIL, found, f"sysctl vm.nr_hugepages={needed} or more, also in /etc/sysctl.d")
    else:
        yield _ok("huge-pages", f"pools use {needed}; {have}")


def _pools(facts: Facts) -> Iterator[Check]:
    for pool in facts.pools:
        room = f"pool {pool.name}: {format_nbytes(pool.free_nbytes)} of {format_nbytes(pool.nbytes)} free"
        remedy = "see `xferctl holds` for who holds it, or raise nbytes of the pool"
        if pool.reason:
            remedy = "see `xferctl devices`; the next allocation tries again"
            yield Check("pools", WARN, f"pool {pool.name} cannot be allocated from: {pool.reason}", remedy)
        elif not pool.free_nbytes:
            yield Check("pools", WARN, room, remedy)
        elif pool.failed_allocations:
            yield Check("pools", WARN, f"{room}; {pool.failed_allocations} groups found no room so far", remedy)
        else:
            yield _ok("pools", room)
    staging = f"{facts.staging_free} of {facts.staging_slots} slots free"
    if facts.staging_waiting >= STAGING_WAITERS and not facts.staging_free:
        found = f"{staging}, {facts.staging_waiting} transfers wait for one"
        yield Check("staging", WARN, found, "raise transfers.staging, or lower transfers.chunk")
    else:
        yield _ok("staging", staging)


def _devices(facts: Facts) -> Iterator[Check]:
    for device in facts.devices:
        if device.reason:
            remedy = (
                "install the driver and `pip install 'xferd[cuda]'`, or take the GPU out of backends.cuda.devices; "
                "then restart the daemon"
            )
            yield Check("devices", WARN, f"GPU {device.index} cannot be used: {device.reason}", remedy)
            continue
        memory = f"{format_nbytes(device.free_nbytes)} of {format_nbytes(device.total_nbytes)} free"
        found = f"GPU {device.index}, {device.name}: {memory}"
        if device.worker_restarts:
            found = f"{found}; {device.worker_restarts} workers ended and were replaced"
            yield Check(
                "devices", WARN, found, "see the daemon's log for device_worker_ended, and the kernel's for Xid"
            )
        else:
            yield _ok("devices", found)
    if not facts.devices:
        yield _ok("devices", "no GPUs: there is no section [backends.cuda]")


def _paths(facts: Facts) -> Iterator[Check]:
    for fact in facts.paths:
        yield _path(fact, facts.uid)
    if not any(fact.name == "files.roots" for fact in facts.paths):
        yield _ok("files.roots", "none: clients register files by descriptor only")


def _path(fact: PathFact, uid: int) -> Check:
    mode = f"{fact.path}, mode {stat.S_IMODE(fact.mode):04o}"
    if fact.error:
        remedy = (
            "restart the daemon, which makes it anew" if fact.kind == "socket" else f"make it, or correct {fact.name}"
        )
        return Check(fact.name, FAIL, f"{fact.path}: {fact.error}", remedy)
    if not _is_kind(fact):
        return Check(fact.name, FAIL, f"{fact.path} is no {fact.kind}", f"move it away, or correct {fact.name}")
    if not fact.is_accessible and fact.name == "files.roots":
        remedy = f"chown or chmod {fact.path}, unless it is meant for reading"
        return Check(fact.name, WARN, f"{mode}: uid {uid} may not make files in it", remedy)
    if not fact.is_accessible:
        wanted = "read" if fact.kind == "file" else "write to"
        return Check(fact.name, FAIL, f"{mode}: uid {uid} may not {wanted} it", f"chown or chmod {fact.path}")
    if fact.secret and fact.mode & 0o077:
        return Check(fact.name, WARN, f"{mode}: others may read it", f"chmod 0600 {fact.path}")
    if not fact.secret and fact.kind == "directory" and fact.name == "node.run_dir" and fact.mode & stat.S_IWOTH:
        return Check(fact.name, FAIL, f"{mode}: anybody may replace the sockets", f"chmod 0755 {fact.path}")
    return _ok(fact.name, mode)


def _is_kind(fact: PathFact) -> bool:
    tests = {"directory": stat.S_ISDIR, "socket": stat.S_ISSOCK, "file": stat.S_ISREG}
    return tests[fact.kind](fact.mode)


def _ports(facts: Facts) -> Iterator[Check]:
    for port in facts.ports:
        if not port.error:
            yield _ok(port.name, f"{port.address} answers")
        elif port.advertised:
            found = f"{port.address}, which peers are told, is not reached from here: {port.error}"
            yield Check(
                port.name, WARN, found, "try it from another node; correct backends.tcp.advertise if it fails there"
            )
        else:
            remedy = "see the firewall of this machine (nft list ruleset), and the daemon's log for a full queue"
            yield Check(port.name, FAIL, f"{port.address} is not reached from this node itself: {port.error}", remedy)
    if not facts.ports:
        yield _ok("ports", "none: this node listens on Unix sockets only")


def _peers(facts: Facts) -> Iterator[Check]:
    if not facts.peers:
        yield _ok("peers", "none that this node deals with")
        return
    bad = [peer for peer in facts.peers if peer.state not in (PeerState.READY, PeerState.DRAINING)]
    if bad:
        found = _some(
            [f"{peer.node.name} {peer.state.value}" + (f" ({peer.reason})" if peer.reason else "") for peer in bad]
        )
        remedy = "see that they run (`xferctl status` there), and that their addresses are reached from here"
        yield Check("peers", WARN, f"{len(bad)} of {len(facts.peers)} cannot be used: {found}", remedy)
    else:
        draining = sum(peer.state is PeerState.DRAINING for peer in facts.peers)
        yield _ok("peers", f"{len(facts.peers)} can be used" + (f", {draining} of them draining" if draining else ""))
    # A peer of epoch 0 was never reached, so that its version is not known.
    other = [f"{peer.node.name} {peer.node.version}" for peer in facts.peers if _differs(peer, facts.version)]
    if other:
        remedy = "upgrade them, or this node, once the roll-out is to be complete"
        yield Check("versions", WARN, f"this node has {facts.version}, others not: {_some(other)}", remedy)
    else:
        yield _ok("versions", f"all have {facts.version}")


def _differs(peer: PeerInfo, version: str) -> bool:
    return bool(peer.node.epoch) and peer.node.version != version


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


_CHECKS: tuple[Callable[[Facts], Iterator[Check]], ...] = (
    _node,
    _config,
    _store,
    _clock,
    _memlock,
    _fds,
    _ptrace,
    _huge,
    _pools,
    lambda facts: check_storage(facts.storage),
    lambda facts: check_stores(facts.stores),
    _devices,
    _paths,
    _ports,
    _peers,
)
