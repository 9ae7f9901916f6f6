"""A writer of TOML for plain values: what ``--print-config`` and the admin face show.

The standard library reads TOML and does not write it; what a configuration needs of the format fits on a page, which
is less than another dependency. Text, numbers, flags, lists, tables and lists of tables; no dates.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


def write_toml(tree: Mapping[str, object]) -> str:
    """Return a document that parses to an equal tree; None values cannot be written and are left out."""
    blocks: list[str] = []
    _table(blocks, (), tree)
    return "\n\n".join(blocks) + "\n"


def _table(blocks: list[str], path: tuple[str, ...], tree: Mapping[str, object]) -> None:
    plain = {key: value for key, value in tree.items() if not isinstance(value, dict) and value is not None}
    tables = {key: value for key, value in tree.items() if isinstance(value, dict)}
    # At the top, lists of tables read best as [[name]]; deeper down they stay on their key's line.
    lists = {key: value for key, value in plain.items() if not path and _is_list_of_tables(value)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items() if key not in lists]
    if path and (lines or not tables):
        lines.insert(0, f"[{'.'.join(map(_key, path))}]")
    if lines:
        blocks.append("\n".join(lines))
    for key in tree:  # in the tree's own order, which is the order of the documentation
        if key in lists:
            for item in lists[key]:  # type: ignore[attr-defined]  # checked by _is_list_of_tables
                rows = [f"{_key(name)} = {_value(value)}" for name, value in item.items() if value is not None]
                blocks.append("\n".join([f"[[{_key(key)}]]", *rows]))
        elif key in tables:
            _table(blocks, (*path, key), tables[key])


def _is_list_of_tables(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, dict) for item in value)


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _text(name)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)  # inf and nan are TOML too
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple):
        return _list(value)
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items() if item is not None)
        return f"{{ {inner} }}" if inner else "{}"
    raise TypeError(f"{type(value).__name__} has no form in TOML here")


def _list(values: Sequence[object]) -> str:
    return f"[{', '.join(map(_value, values))}]"


def _text(text: str) -> str:
    # JSON's escapes are TOML's, but JSON leaves DEL alone and writes astral characters as surrogate pairs.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
