"""Where configuration comes from: a TOML file, the environment and flags, merged into one raw tree.

Knows nothing of what the keys mean; ``config.py`` turns the raw tree into the typed one and uses the origins kept
here to say where a wrong value came from.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from xferd.api.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

KeyPath: TypeAlias = tuple[str, ...]
RawTree: TypeAlias = dict[str, Any]  # as parsed: nothing is known of the values yet

ENV_PREFIX = "XFERD_"
MAX_FILE_NBYTES = 1 << 20

_PART = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


@dataclass(slots=True)
class RawConfig:
    """The merged tree, and for each path that a source set the name of that source."""

    tree: RawTree = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def put(self, path: KeyPath, value: object, origin: str) -> None:
        """Set a value over what earlier sources said; tables merge, anything else replaces.

        Raises:
            ConfigError: a part of the path has a value that is no table.
        """
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                self.put((*path, key), inner, origin)
            return
        table = self.tree
        for depth, part in enumerate(path[:-1], start=1):
            inner = table.get(part)
            if inner is None or inner is False:  # `backends.tcp = false` gives way to a later `backends.tcp.listen`
                inner = table[part] = {}
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"{'.'.join(path)} (from {origin}): {'.'.join(path[:depth])} is no table",
                    remedy=f"it was set by {self.origin(path[:depth])}",
                )
            table = inner
        if value == {} and isinstance(table.get(path[-1]), dict):
            return  # an empty table adds nothing
        table[path[-1]] = value
        self.origins = {known: name for known, name in self.origins.items() if known[: len(path)] != path}
        self.origins[path] = origin

    def origin(self, path: KeyPath) -> str:
        """Return the source of a path, or of the nearest part above or below it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        below = [name for known, name in self.origins.items() if known[: len(path)] == path]
        return below[-1] if below and path else "the defaults"


def gather(
    base: RawTree,
    file: Path | None,
    environ: Mapping[str, str],
    overrides: Sequence[str],
    *,
    is_text: Callable[[KeyPath], bool],
) -> RawConfig:
    """Merge the sources, later ones winning: ``base``, file, environment, flags.

    Args:
        base: what is there before any source; its top-level keys are the sections that exist.
        file: a TOML file, or None.
        environ: ``XFERD_SECTION__KEY`` variables are taken, also ``XFERD_SECTION`` for a whole section. Other
            ``XFERD_`` variables without a double underscore are not ours: the client library has some.
        overrides: "section.key=value" texts.
        is_text: says of a path whether its value is text, which is then taken as it stands.

    Raises:
        ConfigError: a file that cannot be read or parsed, a flag without "=".
    """
    raw = RawConfig()
    raw.tree = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items() if value}
    if file is not None:
        for key, value in read_toml(file).items():
            raw.put((key,), value, str(file))
    for name in sorted(environ):
        path = _env_path(name, base)
        if path:
            raw.put(path, parse_value(environ[name], as_text=is_text(path)), f"environment variable {name}")
    for override in overrides:
        path, text = split_override(override)
        raw.put(path, parse_value(text, as_text=is_text(path)), f"--set {'.'.join(path)}")
    return raw


def read_toml(file: Path) -> RawTree:
    """Read and parse a TOML file.

    Raises:
        ConfigError: it cannot be read, is larger than 1 MiB, or is no TOML; the message has file and line.
    """
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_FILE_NBYTES + 1)
    except OSError as exc:
        raise ConfigError(f"{file}: cannot be read: {exc.strerror}", remedy="check --config") from exc
    if len(raw) > MAX_FILE_NBYTES:
        raise ConfigError(f"{file}: too large", limit=f"{MAX_FILE_NBYTES} bytes", remedy="check --config")
    try:
        return tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{file}: not UTF-8 at byte {exc.start}", remedy="save it as UTF-8") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{file}: {exc}", remedy="values are TOML: text stands in quotes") from exc
    except RecursionError as exc:
        raise ConfigError(f"{file}: nested too deeply", remedy="flatten it") from exc


def split_override(override: str) -> tuple[KeyPath, str]:
    """Split "section.key=value" into its path and the text of the value."""
    key, equals, text = override.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(_PART.fullmatch(part) for part in path):
        raise ConfigError(f"--set {override!r} is no section.key=value", remedy="--set log.level=debug")
    return path, text.strip()


def parse_value(text: str, *, as_text: bool) -> object:
    """Return what the text of a variable or flag means.

    A TOML or JSON literal is taken as such (``8``, ``true``, ``"8MiB"``, ``["/data"]``, ``{a = 1}``, ``{"a": 1}``);
    anything else is text, and so is everything but quoted text where ``as_text`` is set.
    """
    if any("\ud800" <= char <= "\udfff" for char in text):  # how Python shows bytes that are no UTF-8
        raise ConfigError(f"the value {text!r} is not UTF-8", remedy="configuration is UTF-8 throughout")
    value = _literal(text)
    if isinstance(value, str):
        return value
    if as_text or value is None:
        return text
    return value


def _literal(text: str) -> object:
    try:
        document = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        document = {}
    if set(document) == {"value"} and isinstance(document["value"], bool | int | float | str | list | dict):
        return document["value"]
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value


def _env_path(name: str, base: RawTree) -> KeyPath | None:
    if not name.startswith(ENV_PREFIX):
        return None
    path = tuple(part.lower() for part in name[len(ENV_PREFIX) :].split("__"))
    if not all(path) or (len(path) == 1 and path[0] not in base):
        return None
    return path
