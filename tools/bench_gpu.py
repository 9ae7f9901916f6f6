"""Measure memory of a GPU beside NIXL and plain copies, and hold the results against what is wanted of them.

Writes into a folder: `gpu.json` (all figures), `gpu.md` (tables, and the targets), `gpu.svg` (the speeds). Ends with
status 1 if any byte was wrong. Targets that are missed are said, and fail nothing: they are those of an H100.

    python3 tools/bench_gpu.py --quick --out build/gpu
    python3 tools/bench_gpu.py --quick --driver simulated    # without a GPU: that all of it runs
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xferd.api.units import format_nbytes
from xferd.clients.bench import main as xferbench
from xferd.clients.bench._cases import KIB, MIB
from xferd.clients.bench._systems import missing

BESIDE = ("nixl-vram", "nixl-vram-get", "gpu-copy")


@dataclass(frozen=True)
class Target:
    """What a case is to reach: decimal GB/s, or a multiple of another system's speed in the same run."""

    op: str
    src: str
    dst: str
    block_nbytes: int
    batch: int
    least: float
    beside: str = ""

    def of(self, rows: list[dict[str, Any]]) -> tuple[str, str, str, str]:
        """Return (case, wanted, found, verdict)."""
        name = f"{self.op} {self.src} to {self.dst} {format_nbytes(self.block_nbytes)} x {self.batch}"
        unit = f"x {self.beside}" if self.beside else "GB/s"
        found = next((row for row in rows if self._fits(row)), None)
        value = None if found is None else found["ratios"].get(self.beside) if self.beside else found["gb_per_s"]
        if value is None:
            return name, f"{self.least:g} {unit}", "not measured", ""
        return name, f"{self.least:g} {unit}", f"{value:.3g} {unit}", "reached" if value >= self.least else "MISSED"

    def _fits(self, row: dict[str, Any]) -> bool:
        keys = ("op", "src", "dst", "block_nbytes", "batch")
        return row["system"] == "xferd" and all(row[key] == getattr(self, key) for key in keys)


def targets() -> list[Target]:
    """Return what is wanted, of reading and of writing alike."""
    found = []
    for op in ("WRITE", "READ"):
        within = (op, "VRAM", "VRAM")
        found += [Target(*within, 64 * KIB, 1024, 250), Target(*within, 4 * KIB, 1024, 30)]
        found += [Target(*within, 256 * MIB, 1, 0.9, "gpu-copy")]
        # NIXL's WRITE; its READ is held against the setting that makes it faster.
        beside = "nixl-vram" if op == "WRITE" else "nixl-vram-get"
        found += [Target(*within, 64 * KIB, 1024, 20, beside), Target(*within, 4 * KIB, 1024, 40, beside)]
    for way in (("WRITE", "DRAM", "VRAM"), ("READ", "VRAM", "DRAM")):
        found += [Target(*way, 64 * KIB, 1024, 40), Target(*way, 256 * MIB, 1, 0.95, "gpu-copy")]
    return found


def verdicts(rows: list[dict[str, Any]]) -> str:
    """Return the targets as a table."""
    lines = ["| case | wanted | found | |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(target.of(rows))} |" for target in targets()]
    return "\n".join(lines)


def measured(arguments: list[str]) -> tuple[int, str]:
    """Run xferbench; returns its status and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = xferbench(arguments)
    return status, out.getvalue()


def options() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Measure memory of a GPU beside NIXL and plain copies.")
    parser.add_argument("--quick", action="store_true", help="two short rounds: within four minutes")
    parser.add_argument("--rounds", type=int, default=0, help="how often each case is visited")
    parser.add_argument("--driver", choices=("cuda", "simulated"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), metavar="DIR")
    return parser.parse_args()


def main() -> int:
    """Measure, write, show."""
    told = options()
    told.out.mkdir(parents=True, exist_ok=True)
    saved = told.out / "gpu.json"
    saved.unlink(missing_ok=True)  # that of an earlier run would pass for this one's, should this one fail
    beside = [name for name in BESIDE if not missing(name)]
    for name in (name for name in BESIDE if name not in beside):
        sys.stderr.write(f"left out: {missing(name)}\n")
    arguments = ["--cases", "gpu/", "--against", ",".join(beside), "--save", str(saved)]
    arguments += ["--set", f"backends.cuda.driver={told.driver}"]
    arguments += ["--quick"] if told.quick else []
    arguments += ["--rounds", str(told.rounds)] if told.rounds else []
    arguments += ["--plot", str(told.out / "gpu.svg")] if find_spec("matplotlib") else []
    status, text = measured(arguments)
    sys.stdout.write(text)
    if not saved.exists():
        return status or 1
    rows = json.loads(saved.read_text())["rows"]
    table = verdicts(rows)
    sys.stdout.write(f"{table}\n")
    (told.out / "gpu.md").write_text(f"{table}\n\n```text\n{text}```\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
