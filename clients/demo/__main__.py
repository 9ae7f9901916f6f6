"""``python -m xferd.clients.demo``: two nodes hand over the KV cache of a real language model.

Exit status: 0 if the answers are equal to the last bit, 1 if anything differs or fails, 2 for a wrong command line,
130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from xferd.api.errors import XferdError
from xferd.clients.demo.etcd import EtcdMissing
from xferd.clients.demo.model import ModelMissing
from xferd.clients.demo.report import Screen
from xferd.clients.demo.show import DemoFailed, Options, run
from xferd.clients.workers import WorkerFailed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

EXIT_SAME, EXIT_DIFFERENT, EXIT_INTERRUPTED = 0, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parser().parse_args(argv)
    screen = Screen(quiet=args.json_only)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        same = run(Options(args.prompt, args.tokens, args.block_tokens, args.keep, args.etcd), screen)
    except (DemoFailed, EtcdMissing, ModelMissing, WorkerFailed, XferdError) as exc:
        screen.failure(str(exc))
        return EXIT_DIFFERENT
    except KeyboardInterrupt:
        screen.failure("interrupted; everything was stopped")
        return EXIT_INTERRUPTED
    return EXIT_SAME if same else EXIT_DIFFERENT


def _parser() -> argparse.ArgumentParser:
    defaults = Options()
    parser = argparse.ArgumentParser(
        prog="python -m xferd.clients.demo",
        description="Two nodes hand over the KV cache of a real language model.",
        allow_abbrev=False,
    )
    parser.add_argument("--prompt", type=Path, default=defaults.prompt, metavar="FILE", help="text to be read")
    parser.add_argument(
        "--tokens", type=int, default=defaults.new_tokens, metavar="N", help="tokens to write (default %(default)s)"
    )
    parser.add_argument(
        "--block-tokens",
        type=int,
        default=defaults.block_tokens,
        metavar="N",
        help="tokens of one block of the cache (default %(default)s)",
    )
    parser.add_argument(
        "--etcd", action="store_true", help="start a real etcd; the nodes find each other there, by name"
    )
    parser.add_argument("--json-only", action="store_true", help="print nothing but the last line")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy the logs and the KV file to DIR")
    return parser


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Unwind on SIGTERM as on Ctrl-C, so that everything is stopped."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
