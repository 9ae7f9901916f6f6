"""The configuration as the daemon uses it: load it, print it, compare two of them.

Defaults < TOML file < environment < flags, into one frozen tree (``config_tree.py``); an unknown key is an error
that says where it stands and what was probably meant. Nobody reads the environment later: constructors get what
they need from the tree.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from xferd.api.errors import ConfigError
from xferd.daemon.config_checks import check
from xferd.daemon.config_sources import RawConfig, gather
from xferd.daemon.config_toml import write_toml
from xferd.daemon.config_tree import LIVE, Config, default_backends, default_node_name, default_run_dir

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

__all__ = ["Changes", "Config", "ConfigSource", "Key", "diff", "keys", "load_config", "merge_live", "to_toml"]

_Model = TypeVar("_Model", bound=BaseModel)

_SECRET_KEY = re.compile(r"(?i)(password|passwd|secret|token|credential|private_key|access_key|api_key)")
_MESSAGES = {
    "missing": "has no default and must be set",
    "model_type": "must be a table",
    "dict_type": "must be a table",
    "tuple_type": "must be a list",
}
"""Our words where the parser's are about Python."""


@dataclass(frozen=True, slots=True)
class ConfigSource:
    """Where a configuration was loaded from, so that SIGHUP can load it again.

    ``environ`` is the one of the start: a process's environment does not change from outside.
    """

    file: Path | None
    environ: Mapping[str, str]
    overrides: tuple[str, ...] = ()

    def load(self) -> Config:
        """Load it; raises ``ConfigError``."""
        return load_config(self.file, self.environ, self.overrides)


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the tree: "transfers.chunk", or "pools[].nbytes" for a key of each item of a list."""

    path: str
    field: FieldInfo
    is_live: bool


@dataclass(frozen=True, slots=True)
class Changes:
    """The keys in which two trees differ: those that a running daemon takes over, and those that need a restart."""

    live: tuple[str, ...]
    fixed: tuple[str, ...]


def load_config(file: Path | None, environ: Mapping[str, str], overrides: Sequence[str] = ()) -> Config:
    """Load and check the configuration; ``node.name`` and ``node.run_dir`` are filled in where they are "".

    Args:
        file: TOML, or None for the defaults.
        environ: ``XFERD_SECTION__KEY`` variables are taken; also where the run directory goes by default.
        overrides: "section.key=value" texts, which win over everything.

    Raises:
        ConfigError: anything at all is wrong; the message has every problem, each with its key and its source.
    """
    base: dict[str, Any] = dict.fromkeys(Config.model_fields)
    raw = gather(base | {"backends": default_backends()}, file, environ, overrides, is_text=_is_text)
    backends = raw.tree.get("backends")
    if isinstance(backends, dict):  # `posix = false` takes a backend out that is there by default
        raw.tree["backends"] = {name: section for name, section in backends.items() if section is not False}
    try:
        config = Config.model_validate(raw.tree)
    except ValidationError as exc:
        raise _config_error([_explain(error, raw) for error in exc.errors(include_url=False)]) from None
    node = {
        "name": config.node.name or default_node_name(),
        "run_dir": config.node.run_dir or str(default_run_dir(environ, os.geteuid())),
    }
    config = config.model_copy(update={"node": config.node.model_copy(update=node)})
    problems = [
        f"{problem.key} (from {raw.origin(tuple(problem.key.split('.')))}): {problem.message}; {problem.remedy}"
        for problem in check(config)
    ]
    if problems:
        raise _config_error(problems)
    return config


def to_toml(config: Config, *, redact: bool = True) -> str:
    """Return TOML that loads back to an equal tree.

    Paths of secret files are shown, their contents never are. With ``redact``, text under a key of a backend's
    section that sounds like a secret itself is shown as "***".
    """
    tree = config.model_dump(mode="json")
    switched_off = {name: False for name in default_backends() if name not in config.backends}
    tree["backends"] = switched_off | (_redacted(config.backends) if redact else config.backends)
    return write_toml(tree)


def diff(old: Config, new: Config) -> Changes:
    """Return which keys differ, in the order of the tree; lists count as one key, and so does a backend's section."""
    live: list[str] = []
    fixed: list[str] = []
    for key in keys(items=False):
        if _at(old, key.path) != _at(new, key.path):
            (live if key.is_live else fixed).append(key.path)
    names = sorted(old.backends.keys() | new.backends.keys())
    fixed.extend(f"backends.{name}" for name in names if old.backends.get(name) != new.backends.get(name))
    return Changes(tuple(live), tuple(fixed))


def merge_live(old: Config, new: Config) -> Config:
    """Return ``old`` with the live keys of ``new``: what is in force after a reload.

    Raises:
        ConfigError: they do not go together, for example a new limit that a key which waits for a restart contradicts.
    """
    merged = _merge_live(old, new)
    problems = [f"{problem.key}: {problem.message}; {problem.remedy}" for problem in check(merged)]
    if problems:
        raise _config_error([f"{problem} (some of the new keys wait for a restart)" for problem in problems])
    return merged


def keys(
    model: type[BaseModel] = Config, prefix: str = "", *, items: bool = True, is_live: bool = False
) -> Iterator[Key]:
    """Yield every key that holds a value, in order; ``items`` adds the keys of the tables in lists.

    The sections of backends are left out: they are described by the backends. The last two arguments are for the
    sections below: where they stand, and whether they are in a list that is live as a whole.
    """
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        inner = _model_of(field.annotation)
        if path == "backends":
            continue
        if inner is not None and not get_args(field.annotation):
            yield from keys(inner, f"{path}.", items=items)
            continue
        key = Key(path, field, is_live or LIVE in field.metadata)
        yield key
        if inner is not None and items:
            yield from keys(inner, f"{path}[].", is_live=key.is_live)


def _merge_live(old: _Model, new: _Model) -> _Model:
    update: dict[str, object] = {}
    for name, field in type(old).model_fields.items():
        mine, theirs = getattr(old, name), getattr(new, name)
        if isinstance(mine, BaseModel):
            update[name] = _merge_live(mine, theirs)
        elif LIVE in field.metadata:
            update[name] = theirs
    return old.model_copy(update=update)


def _at(config: Config, path: str) -> object:
    value: object = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _model_of(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *get_args(annotation))
    return next((item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)), None)


def _field_at(path: Sequence[str]) -> FieldInfo | None:
    model: type[BaseModel] | None = Config
    field = None
    for part in path:
        field = model.model_fields.get(part) if model is not None else None
        if field is None:
            return None
        model = _model_of(field.annotation)
    return field


def _is_text(path: Sequence[str]) -> bool:
    field = _field_at(path)
    if field is None:
        return False
    annotation = field.annotation
    return annotation is str or any(isinstance(choice, str) for choice in get_args(annotation))


def _explain(error: ErrorDetails, raw: RawConfig) -> str:
    names = tuple(part for part in error["loc"] if isinstance(part, str))
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        nearest = _nearest(names)
        message = f"unknown key; did you mean {nearest}?" if nearest else "unknown key"
    else:
        message = _MESSAGES.get(error["type"], message)
    return f"{key} (from {raw.origin(names)}): {message[:1].lower()}{message[1:]}"


def _nearest(names: Sequence[str]) -> str:
    """Return the known key that an unknown one most resembles: in its own section first, then anywhere."""
    section = _model_of(field.annotation) if (field := _field_at(names[:-1])) else Config
    beside = {name: ".".join((*names[:-1], name)) for name in (section.model_fields if section else ())}
    anywhere = {path.rpartition(".")[2]: path for path in (key.path for key in keys())}
    for candidates, cutoff in ((beside, 0.6), (anywhere, 0.75)):
        close = difflib.get_close_matches(names[-1], candidates, n=1, cutoff=cutoff)
        if close:
            return candidates[close[0]]
    return ""


def _config_error(problems: Sequence[str]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(problems[0])
    return ConfigError("\n".join([f"{len(problems)} problems:", *(f"  {problem}" for problem in problems)]))


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: "***" if isinstance(inner, str) and inner and _is_secret(key) else _redacted(inner)
            for key, inner in value.items()
        }
    return [_redacted(item) for item in value] if isinstance(value, list | tuple) else value


def _is_secret(key: str) -> bool:
    return bool(_SECRET_KEY.search(key)) and not key.endswith(("_file", "_path", "_dir"))
