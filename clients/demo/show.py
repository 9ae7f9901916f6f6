"""The demonstration from beginning to end: who is started when, what is asked of whom, what must come out."""

from __future__ import annotations

import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from xferd.api.errors import XferdError
from xferd.clients.demo.checks import compare
from xferd.clients.demo.etcd import EtcdProcess, require_etcd
from xferd.clients.demo.model import NAME, ModelShape, require_packages
from xferd.clients.demo.paging import Geometry
from xferd.clients.demo.report import Row, Screen, Summary, time_row, transfer_row
from xferd.clients.demo.roles import Decode, Decoded, Prefill, Prefilled, Reference
from xferd.clients.nodes import Node, Nodes
from xferd.clients.workers import Worker, WorkerFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xferd.clients.demo.checks import Generation
    from xferd.clients.demo.roles import Found, Leg

PROMPT = Path(__file__).with_name("prompt.txt")
POOL = "1GiB"
"""Twice what the longest prompt that the model takes would need; a pool takes memory only as it is touched."""
DECODE_ADDRESS = "decode@b"
REPEATS = 5
RECOMPUTES = 3
LOG_TAIL_LINES = 20


@dataclass(frozen=True, slots=True)
class Options:
    """What can be chosen on the command line."""

    prompt: Path = PROMPT
    new_tokens: int = 32
    block_tokens: int = 16
    keep: Path | None = None
    etcd: bool = False


class DemoFailed(Exception):
    """The demonstration could not be given; a difference in the results is no such failure."""


@dataclass(frozen=True, slots=True)
class Stage:
    """All that runs."""

    a: Node
    b: Node
    folder: Path
    reference: Worker
    prefill: Worker
    decode: Worker
    etcd: EtcdProcess | None


@dataclass(frozen=True, slots=True)
class Script:
    """What is played: the prompt's tokens, the shape of the caches, and the answer that must come out."""

    tokens: list[int]
    geometry: Geometry
    answer: Generation


@dataclass(frozen=True, slots=True)
class Lookup:
    """Node a as node b found it in etcd, and as it knows it once the two have dealt with each other."""

    first: Found
    again: Found


@dataclass(frozen=True, slots=True)
class Played:
    """What happened; times in seconds."""

    meet_s: float
    prefilled: Prefilled
    first: Decoded
    again: list[Leg]
    recompute_s: float
    stored: Leg
    second: Decoded
    lookup: Lookup | None


def run(options: Options, screen: Screen) -> bool:
    """Give the demonstration; returns whether everything was equal. Leaves no process and no file behind.

    Raises:
        DemoFailed: the options make no sense.
        WorkerFailed, XferdError: something broke.
        ModelMissing, EtcdMissing: something is not installed.
    """
    require_packages()
    if options.etcd:
        require_etcd()
    prompt = _prompt(options)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="xferd-demo-", ignore_cleanup_errors=True)))
        etcd = _start_etcd(stack, folder, screen) if options.etcd else None
        nodes = stack.enter_context(Nodes())
        if options.keep is not None:
            stack.callback(_keep, options.keep, nodes.root, folder)
        stack.enter_context(_logs_on_failure(screen, nodes.root, folder))
        with screen.step(f"unpacking {NAME} and starting two daemons"):
            stage = _start(stack, nodes, folder, etcd)
        with screen.step("reading the prompt and writing the answer in one process, for reference"):
            script = _rehearse(stage, prompt, options)
        with screen.step("loading the model into the prefill and the decode process"):
            _set_up(stage, script)
        with screen.step("handing over through the wire and through a file"):
            played = _play(stage, script, options.new_tokens)
    return _tell(screen, script, played)


def _prompt(options: Options) -> str:
    if options.new_tokens < 1 or options.block_tokens < 1:
        raise DemoFailed("--tokens and --block-tokens take numbers from 1")
    try:
        return options.prompt.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise DemoFailed(f"the prompt cannot be read: {exc}") from exc


def _start_etcd(stack: ExitStack, folder: Path, screen: Screen) -> EtcdProcess:
    """Start etcd before the daemons, which then end before it does, and can take their records away."""
    with screen.step("starting etcd"):
        return stack.enter_context(EtcdProcess(folder))


def _start(stack: ExitStack, nodes: Nodes, folder: Path, etcd: EtcdProcess | None) -> Stage:
    """Start everything else. The workers import their libraries while the first of them unpacks the model.

    With etcd, no daemon is told of the other: they have but the endpoint.
    """
    reference, prefill, decode = (
        stack.enter_context(Worker(role.__name__.lower(), role)) for role in (Reference, Prefill, Decode)
    )
    reference.begin("convert", folder)
    settings = [f'files.roots=["{folder.resolve()}"]', f'pools=[{{name="host", nbytes="{POOL}"}}]']
    if etcd is not None:
        settings += ["metadata.store=etcd", f'metadata.etcd.endpoints=["{etcd.endpoint}"]']
    a = nodes.start("a", settings=settings)
    b = nodes.start("b", peers=[] if etcd else [a], settings=settings)
    reference.result()
    return Stage(a, b, folder, reference, prefill, decode, etcd)


def _rehearse(stage: Stage, prompt: str, options: Options) -> Script:
    """Let one process do it all."""
    shape: ModelShape = stage.reference.call("load", stage.folder)
    tokens: list[int] = stage.reference.call("encode", prompt)
    if len(tokens) < 2 or len(tokens) + options.new_tokens > shape.max_tokens:
        raise DemoFailed(
            f"the prompt has {len(tokens)} tokens; the model takes up to {shape.max_tokens} with the answer"
        )
    needed = -(-len(tokens) // options.block_tokens)
    geometry = Geometry(shape.layers, shape.kv_heads, shape.head_dim, options.block_tokens, capacity=2 * needed)
    return Script(tokens, geometry, stage.reference.call("answer", tokens, options.new_tokens))


def _set_up(stage: Stage, script: Script) -> None:
    for worker in (stage.prefill, stage.decode):
        worker.begin("load", stage.folder)
    for worker in (stage.prefill, stage.decode):
        worker.result()
        worker.call("warm_up", script.tokens)


def _play(stage: Stage, script: Script, count: int) -> Played:
    """Hand over twice. One worker computes at a time, so that times are what they would be on machines of their own."""
    a, b = stage.prefill, stage.decode
    b.call("attach", stage.b.session_socket, script.geometry)
    a.call("attach", stage.a.session_socket, script.geometry)
    found: Found | None = b.call("find", stage.a.name) if stage.etcd else None
    a.call("offer", DECODE_ADDRESS)
    meet_s: float = b.call("meet")

    b.begin("receive", count)
    prefilled: Prefilled = a.call("hand_over", script.tokens, DECODE_ADDRESS)
    first: Decoded = b.result()
    a.call("confirm")
    again: list[Leg] = b.call("read_again", REPEATS)
    lookup = Lookup(found, b.call("find", stage.a.name)) if found else None
    recompute_s = median(b.call("recompute", script.tokens, RECOMPUTES))

    path = stage.folder.resolve() / "conversation.kv"
    stored: Leg = a.call("store", path)
    b.begin("resume", count)
    a.call("point_to", path, DECODE_ADDRESS)
    return Played(meet_s, prefilled, first, again, recompute_s, stored, b.result(), lookup)


def _tell(screen: Screen, script: Script, played: Played) -> bool:
    geometry, first, second = script.geometry, played.first, played.second
    cached = len(script.tokens) - 1
    blocks = geometry.layers * 2 * geometry.blocks_of(cached)
    screen.paragraph("One process answers:", script.answer.text)
    screen.paragraph("Handed over through tcp:", first.generation.text)
    screen.paragraph("Handed over through a file:", second.generation.text)
    again = sorted(played.again, key=lambda leg: leg.wall_s)
    rows: list[Row] = [
        *_lookup_rows(screen, played.lookup),
        time_row("lists prepared, once for a pair of nodes", played.meet_s),
        time_row("prefill at a", played.prefilled.prefill_s),
        time_row("KV into blocks of the pool at a", played.prefilled.scatter_s),
        transfer_row("READ by b", first.leg.wall_s, first.leg.status, blocks),
        transfer_row(
            f"the same again, median of {REPEATS}", median(leg.wall_s for leg in again), again[0].status, blocks
        ),
        time_row("KV out of blocks at b", first.gather_s),
        transfer_row("WRITE to a file by a", played.stored.wall_s, played.stored.status, blocks),
        transfer_row("READ of the file by b", second.leg.wall_s, second.leg.status, blocks),
        time_row("time to first token: transfer", first.ttft_s),
        time_row("time to first token: file", second.ttft_s),
        time_row(f"time to first token: prefill at b, median of {RECOMPUTES}", played.recompute_s),
    ]
    size = f"{geometry.block_tokens} tokens, {geometry.block_nbytes:,} bytes a block"
    screen.table(f"KV cache of {cached:,} tokens: {geometry.layers} layers, keys and values in blocks of {size}", rows)
    verdicts = [compare(script.answer, decoded.generation) for decoded in (first, second)]
    for way, verdict in zip(("tcp", "file"), verdicts, strict=True):
        screen.verdict(f"{len(script.answer.tokens)} tokens after {way}", verdict)
    screen.last_line(
        Summary(
            tokens_equal=all(verdict.tokens_equal for verdict in verdicts),
            logits_equal=all(verdict.logits_equal for verdict in verdicts),
            kv_nbytes=first.leg.status.telemetry.moved_nbytes,
            blocks=blocks,
            transfer_ms=first.leg.wall_s * 1e3,
            file_ms=second.leg.wall_s * 1e3,
            ttft_transfer_ms=first.ttft_s * 1e3,
            ttft_recompute_ms=played.recompute_s * 1e3,
            lookup_ms=played.lookup.first.wall_s * 1e3 if played.lookup else None,
        )
    )
    return all(verdict.is_same for verdict in verdicts)


def _lookup_rows(screen: Screen, lookup: Lookup | None) -> list[Row]:
    """Show what was found in etcd; returns the table's lines of how long that took."""
    if lookup is None:
        return []
    node, again = lookup.first.node, lookup.again.node
    later = "the same" if again.epoch == node.epoch else f"epoch {again.epoch}"
    screen.paragraph(
        f"Node {node.name}, found by name in etcd by node b:",
        f"{', '.join(node.addresses)}, epoch {node.epoch}; {later} after the hand-over",
    )
    return [
        time_row(f"node {node.name} looked up in etcd", lookup.first.wall_s),
        time_row("looked up again, from the copy that b keeps current", lookup.again.wall_s),
    ]


@contextmanager
def _logs_on_failure(screen: Screen, *folders: Path) -> Iterator[None]:
    """Show how the logs of daemons, and of etcd, end if something breaks; they are gone afterwards."""
    try:
        yield
    except (WorkerFailed, XferdError):
        for log in (log for folder in folders for log in sorted(folder.glob("*.log"))):
            lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
            screen.failure("\n  ".join([f"the log of {log.stem} ends with", *lines]))
        raise


def _keep(target: Path, *sources: Path) -> None:
    """Copy what is worth reading afterwards."""
    target.mkdir(parents=True, exist_ok=True)
    for source in sources:
        for pattern in ("*.log", "*.kv"):
            for file in source.glob(pattern):
                shutil.copy2(file, target / file.name)
