"""What ``xferbench profile`` profiles, and at which functions of the client and of the daemons it puts stamps.

A point is "name=module:Class.method:place", as ``_stamped_daemon.py`` has it. All daemons of a subject have all of its
points: of two that are passed at both ends, the first one within a request counts.
"""

from __future__ import annotations

from dataclasses import dataclass

RING_POINTS = (
    "awake=xferd.daemon.rings.ring:Ring._on_doorbell:enter",
    "posting=xferd.daemon.engine.desk:TransferDesk._post:enter",
    "copy=xferd.daemon.engine.runner:Runner.quick:call",
    "told=xferd.daemon.rings.ring:Ring._tell:enter",
)
THREADS_POINTS = (
    "awake=xferd.daemon.rings.ring:Ring._on_doorbell:enter",
    "posting=xferd.daemon.engine.desk:TransferDesk._post:enter",
    "begin=xferd.plugins.local.backend:LocalBackend.begin:enter",
    "given=xferd.plugins.local.backend:LocalBackend.begin:exit",
    "copy=xferd.plugins.movers:Batch.perform_next:enter",
    "copied=xferd.plugins.movers:MoverPool._report:enter",
    "back=xferd.plugins.movers:MoverPool._collect:enter",
    "told=xferd.daemon.rings.ring:Ring._tell:enter",
)
GRPC_POINTS = (
    "awake=xferd.api.grpc.transfers:TransferServicer.Post:enter",
    "posting=xferd.daemon.engine.desk:TransferDesk._post:enter",
    "copy=xferd.daemon.engine.runner:Runner.quick:call",
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the way: what happens until its stamp is reached, and at which end."""

    stamp: str
    at: str
    what: str


RING_STAGES = (
    Stage("sent", "client", "find the transfer, write the submission"),
    Stage(
        "awake", "both", "ring the doorbell (one system call); the daemon's loop wakes up and calls the ring's reader"
    ),
    Stage("posting", "daemon", "read and check the submission, find the transfer"),
    Stage("copy", "daemon", "check rights and state, note who hears of the end"),
    Stage("copy+", "daemon", "copy 4 KiB"),
    Stage("told", "daemon", "end the transfer: state, who listens"),
    Stage("seen", "both", "write the completion, signal; the client wakes up, or still looks, and takes it"),
    Stage("end", "client", "put the status together and return"),
)
THREADS_STAGES = (
    *RING_STAGES[:3],
    Stage("begin", "daemon", "check state and rights, hold the regions, take a slot, arm the deadline"),
    Stage("given", "daemon", "give the chunk to the mover threads"),
    Stage("copy", "daemon", "the first thread wakes up"),
    Stage("copied", "daemon", "copy 4 MiB"),
    Stage("back", "daemon", "the event loop wakes up"),
    Stage("told", "daemon", "end the chunk and the transfer: cost, state, holds, metrics"),
    *RING_STAGES[-2:],
)
GRPC_STAGES = (
    Stage("sent", "client", "build the request"),
    Stage("awake", "both", "gRPC: serialize, send, wake the daemon, parse, start the handler"),
    Stage("posting", "daemon", "check the token, find session and transfer"),
    Stage("copy", "daemon", "check rights and state"),
    Stage("copy+", "daemon", "copy 4 KiB"),
    Stage("awake+", "daemon", "end the transfer: state, metrics, log; build the answer"),
    Stage("seen", "both", "gRPC: serialize, send, wake the client, parse"),
    Stage("end", "client", "make the status and return"),
)


REMOTE_POINTS = (
    *THREADS_POINTS[:2],
    "begin=xferd.plugins.tcp.backend:TcpBackend.begin:enter",
    "asked=xferd.plugins.tcp.streams:BlockingStream.send_early:enter",
    "serving=xferd.plugins.tcp.server:ServedLane._serve:enter",
    "ended=xferd.plugins.tcp.exchange:Answers._end:enter",
    "settled=xferd.plugins.tcp.lanes:Ticket.settle:enter",
    "told=xferd.daemon.rings.ring:Ring._tell:enter",
)
READ_POINTS = (
    *REMOTE_POINTS,
    "granted=xferd.plugins.tcp.server:ServedLane._send_windows:enter",
    "came=xferd.plugins.tcp.streams:BlockingStream.receive_payload:enter",
    "poured=xferd.plugins.tcp.server:ServedLane._send_windows:exit",
)
WRITE_POINTS = (
    *REMOTE_POINTS,
    "granted=xferd.plugins.tcp.server:ServedLane._fill_windows:enter",
    "filled=xferd.plugins.tcp.server:ServedLane._fill_windows:exit",
)
_ASKED = (
    *THREADS_STAGES[:3],
    Stage("begin", "daemon", "check state and rights, hold the regions, take a slot, arm the deadline"),
    Stage("asked", "daemon", "take a lane, build the request"),
    Stage("serving", "both", "send the request; the peer's thread wakes up and reads it"),
    Stage("granted", "peer", "decode it; check rights, generations and epoch; look up the addresses"),
)
_ENDED = (
    Stage("ended", "both", "the peer closes the grant and says so; the lane's thread hears of it"),
    Stage("settled", "daemon", "the event loop wakes up"),
    *THREADS_STAGES[-3:],
)
READ_STAGES = (
    *_ASKED,
    Stage("came", "both", "the first bytes go, and wake up the lane's thread"),
    Stage("poured", "both", "4 MiB: into the socket there, and out of it here"),
    *_ENDED,
)
WRITE_STAGES = (
    *_ASKED,
    Stage("filled", "both", "4 MiB: the lane's thread wakes up; into the socket here, and out of it there"),
    *_ENDED,
)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is profiled, with which stamps in the daemons.

    Attributes:
        title: what a person calls it.
        control: by which control plane it is asked for: "ring" or "grpc".
        points: stamps of the daemons.
        stages: in the order in which a request comes past them.
        op: "READ" or "WRITE".
        blocks: of ``block_nbytes`` each; those of a remote subject are scattered on both sides.
        is_remote: between two daemons, over TCP.
    """

    title: str
    control: str
    points: tuple[str, ...]
    stages: tuple[Stage, ...]
    op: str = "WRITE"
    blocks: int = 1
    block_nbytes: int = 4096
    is_remote: bool = False


SUBJECTS = {
    "ring": Subject("One prepared 4 KiB transfer by the ring", "ring", RING_POINTS, RING_STAGES),
    "threads": Subject(
        "One prepared 4 MiB transfer by the ring, copied by threads",
        "ring",
        THREADS_POINTS,
        THREADS_STAGES,
        blocks=1,
        block_nbytes=4 << 20,
    ),
    "grpc": Subject("One prepared 4 KiB transfer by gRPC", "grpc", GRPC_POINTS, GRPC_STAGES),
    "read": Subject(
        "One prepared READ of 1024 blocks of 4 KiB from another node, by TCP",
        "ring",
        READ_POINTS,
        READ_STAGES,
        op="READ",
        blocks=1024,
        is_remote=True,
    ),
    "write": Subject(
        "One prepared WRITE of 1024 blocks of 4 KiB to another node, by TCP",
        "ring",
        WRITE_POINTS,
        WRITE_STAGES,
        blocks=1024,
        is_remote=True,
    ),
}
