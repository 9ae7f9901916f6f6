"""A daemon that notes when it comes past certain functions. A script of ``_stages.py``; nobody imports it.

Arguments: the file to write, then "name=module:Class.method[:enter|exit|call]" for each stamp, then ``--`` and those
of the daemon. "call" is for functions that return a function: that one's begin and end are noted, as name and name+.
Times are of CLOCK_MONOTONIC, which all processes share. Functions that there are none of (any more) are left out.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Stamps = list[tuple[str, int]]


def wrap(spec: str, stamps: Stamps) -> bool:
    """Put a stamp on a function; False if there is no such function."""
    name, _, place = spec.partition("=")
    module, path, when = place.split(":")
    *outer, last = path.split(".")
    try:
        owner: Any = functools.reduce(getattr, outer, import_module(module))
        function = getattr(owner, last)
    except (ImportError, AttributeError):
        return False
    setattr(owner, last, _stamping(function, name, when, stamps))
    return True


def _stamping(function: Callable[..., Any], name: str, when: str, stamps: Stamps) -> Callable[..., Any]:
    note, clock = stamps.append, time.perf_counter_ns
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            note((name, clock()))
            try:
                return await function(*args, **kwargs)
            finally:
                note((f"{name}+", clock()))

        return awaited

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if when == "enter":
            note((name, clock()))
        result = function(*args, **kwargs)
        if when == "exit":
            note((name, clock()))
        elif when == "call" and result is not None:
            return _stamping_call(result, name, stamps)
        return result

    return called


def _stamping_call(function: Callable[[], Any], name: str, stamps: Stamps) -> Callable[[], Any]:
    def called() -> Any:
        stamps.append((name, time.perf_counter_ns()))
        try:
            return function()
        finally:
            stamps.append((f"{name}+", time.perf_counter_ns()))

    return called


def main(arguments: list[str]) -> int:
    """Wrap, run the daemon until it is told to end, write the stamps."""
    target, *rest = arguments
    split = rest.index("--")
    stamps: Stamps = []
    missing = [spec for spec in rest[:split] if not wrap(spec, stamps)]
    try:
        status: int = import_module("xferd.daemon.cli").main(rest[split + 1 :])
    finally:
        Path(target).write_text(json.dumps({"missing": missing, "stamps": stamps}))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
