"""The command ``xferd``: serve, or print or check the configuration that serving would use.

Exit status: 0 for success, 1 for a daemon that failed, 2 for a wrong command line or configuration.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from xferd.api.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xferd.daemon.config import Config, ConfigSource

DESCRIPTION = """Move bytes for AI inference: one daemon for each node.

Configuration comes from defaults, then the file, then XFERD_SECTION__KEY variables, then --set."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not (args.command or args.print_config or args.validate_config):
        parser.print_help(sys.stderr)
        return 2
    try:
        source, config = _load(args.config, args.overrides)
        if args.validate_config or args.print_config:
            _check_backends(config)
    except ConfigError as exc:
        print(f"xferd: {exc}", file=sys.stderr)  # noqa: T201 - the command's own voice
        return 2
    if args.print_config:
        from xferd.daemon.config import to_toml

        print(to_toml(config), end="")  # noqa: T201
        return 0
    if args.validate_config:
        print(f"the configuration of node {config.node_name} is valid", file=sys.stderr)  # noqa: T201
        return 0
    return _serve(config, source)


def version() -> str:
    """Return the installed version."""
    try:
        return metadata.version("xferd")
    except metadata.PackageNotFoundError:
        return "0+unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xferd", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    # One flat parser: with sub-commands, options before the command would be forgotten by those after it.
    parser.add_argument("command", nargs="?", choices=["serve"], help="run the daemon in the foreground")
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file (TOML)")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="set one key; may be given many times, and wins over file and environment",
    )
    parser.add_argument("--print-config", action="store_true", help="print the configuration in force, as TOML")
    parser.add_argument("--validate-config", action="store_true", help="check the configuration and exit")
    parser.add_argument("--version", action="version", version=f"xferd {version()}")
    return parser


def _load(file: Path | None, overrides: Sequence[str]) -> tuple[ConfigSource, Config]:
    from xferd.daemon.config import ConfigSource  # here, so that --version and --help answer at once

    source = ConfigSource(file.absolute() if file else None, dict(os.environ), tuple(overrides))
    return source, source.load()


def _check_backends(config: Config) -> None:
    """Check the sections of all backends, as the start would; raises ``ConfigError``."""
    from xferd.api.errors import Unsupported
    from xferd.plugins.registry import load_backend, parse_options

    for name, section in config.backends.items():
        try:
            parse_options(name, load_backend(name), section)
        except Unsupported as exc:
            raise ConfigError(exc.message, remedy=exc.remedy) from exc


def _serve(config: Config, source: ConfigSource) -> int:
    from xferd.daemon import log
    from xferd.daemon.app import serve
    from xferd.daemon.lifecycle import run_daemon

    log.configure(config.log.level, config.log.format)
    log.bind_process(node=config.node_name)
    logging.captureWarnings(True)
    return run_daemon(serve, config, source)


if __name__ == "__main__":
    sys.exit(main())
