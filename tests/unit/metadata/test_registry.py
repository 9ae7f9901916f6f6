"""Stores are found by name; what is missing is said with its remedy."""

from __future__ import annotations

import pytest

from xferd.api.errors import ConfigError, Unsupported
from xferd.metadata import registry
from xferd.metadata.base import Store
from xferd.metadata.embedded import EmbeddedStore


def test_embedded_is_found() -> None:
    assert registry.store_class("embedded") is EmbeddedStore


@pytest.mark.parametrize("name", sorted(registry.BUILTIN_STORES))
def test_every_name_leads_to_a_store(name: str) -> None:
    assert issubclass(registry.store_class(name), Store)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'zookeeper'.*embedded"):
        registry.store_class("zookeeper")


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILTIN_STORES, "etcd", "no_such_client_library:Store")
    with pytest.raises(Unsupported, match=r"no_such_client_library.*xferd\[etcd\]"):
        registry.store_class("etcd")
