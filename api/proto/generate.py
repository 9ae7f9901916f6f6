"""Generate the protobuf and gRPC code that stands beside this file, or check that it is current.

Run as ``python api/proto/generate.py [--check]`` from the repository's root. The versions of the generators are
pinned in the extra ``dev``, so that the same input gives the same output.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2]
PROTO_DIR = Path("xferd/api/proto")
PROTOS = ("xferd_v1.proto", "session_v1.proto", "peer_v1.proto")


def generate(out_dir: Path) -> None:
    """Write the generated modules below ``out_dir/xferd/api/proto``."""
    include = resources.files("grpc_tools") / "_proto"
    code = protoc.main(
        [
            "protoc",
            f"-I{ROOT / '.types'}",
            f"-I{include}",
            f"--python_out={out_dir}",
            f"--mypy_out={out_dir}",
            *(str(PROTO_DIR / name) for name in PROTOS),
        ]
    )
    code = code or protoc.main(
        [
            "protoc",
            f"-I{ROOT / '.types'}",
            f"-I{include}",
            f"--grpc_python_out={out_dir}",
            f"--mypy_grpc_out={out_dir}",
            str(PROTO_DIR / "xferd_v1.proto"),
        ]
    )
    if code:
        raise SystemExit(f"protoc failed with status {code}")


def main() -> None:
    """Generate in place, or with ``--check`` compare and exit 1 when something is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the code is not current")
    check = parser.parse_args().check
    target_dir = ROOT / "api/proto"
    with tempfile.TemporaryDirectory() as tmp:
        generate(Path(tmp))
        stale = []
        for made in sorted((Path(tmp) / PROTO_DIR).iterdir()):
            target = target_dir / made.name
            if not target.exists() or target.read_bytes() != made.read_bytes():
                stale.append(made.name)
                if not check:
                    target.write_bytes(made.read_bytes())
    if check and stale:
        sys.exit(f"generated code is not current: {', '.join(stale)}; run `make proto`")
    sys.stdout.write(f"{'stale' if check else 'written'}: {', '.join(stale) or 'nothing'}\n")


if __name__ == "__main__":
    main()
