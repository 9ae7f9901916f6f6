"""Stores by the name that the configuration gives (``[metadata] store = "..."``).

A store's module is imported only when it is configured, because a store may need a client library that is an extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from xferd.api.errors import ConfigError, Unsupported

if TYPE_CHECKING:
    from xferd.metadata.base import Store

BUILTIN_STORES = {
    "embedded": "xferd.metadata.embedded:EmbeddedStore",
    "etcd": "xferd.metadata.etcd:EtcdStore",
}


def store_class(name: str) -> type[Store]:
    """Return the class of a store.

    Raises:
        ConfigError: no store has this name; the message names those there are.
        Unsupported: the store needs a library that is not installed.
    """
    target = BUILTIN_STORES.get(name)
    if target is None:
        raise ConfigError(
            f"there is no metadata store {name!r}",
            limit=f"one of: {', '.join(sorted(BUILTIN_STORES))}",
            remedy="correct metadata.store",
        )
    module, _, attribute = target.partition(":")
    try:
        found: type[Store] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as exc:
        raise Unsupported(
            f"the metadata store {name!r} needs the module {exc.name!r}, which is not installed",
            remedy=f"pip install 'xferd[{name}]'",
        ) from exc
    return found
