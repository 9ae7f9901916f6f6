"""Find backends by name, check their options, construct those that are configured.

Built-in backends are in one table; others come by the entry point group ``xferd.backends``. A backend's module is
imported only if its section exists.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from xferd.api.errors import ConfigError, Unsupported
from xferd.plugins.base import Backend
from xferd.plugins.decorator import BackendDecorator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_core import ErrorDetails

ENTRY_POINTS = "xferd.backends"

BUILT_IN: Mapping[str, str] = {
    "local": "xferd.plugins.local:LocalBackend",
    "posix": "xferd.plugins.posix:PosixBackend",
    "tcp": "xferd.plugins.tcp:TcpBackend",
    "ucx": "xferd.plugins.ucx:UcxBackend",
    "object": "xferd.plugins.object:ObjectBackend",
    "cuda": "xferd.plugins.cuda.backend:CudaBackend",
    "gds": "xferd.plugins.gds:GdsBackend",
    "faulty": "xferd.plugins.faulty:FaultyBackend",
}
"""Name, as in the configuration, to "module:class". An optional one has an extra of the same name in pyproject.toml."""


def known_backends() -> tuple[str, ...]:
    """Return the names that a section may have, built-in ones first."""
    foreign = sorted({point.name for point in entry_points(group=ENTRY_POINTS)} - set(BUILT_IN))
    return (*BUILT_IN, *foreign)


def load_backend(name: str) -> type[Backend]:
    """Import a backend's class.

    Raises:
        ConfigError: no backend has the name, two packages offer it, or what is offered is no backend.
        Unsupported: something that it imports is not installed; the remedy names what to install.
    """
    place, origin = _find(name)
    module, _, attribute = place.partition(":")
    try:
        found: object = getattr(importlib.import_module(module), attribute, None)
    except ImportError as exc:
        raise Unsupported(
            f"backend {name!r} cannot be imported: {exc}",
            remedy=f"pip install 'xferd[{name}]'" if name in BUILT_IN else f"install what {origin} requires",
        ) from exc
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise ConfigError(f"backend {name!r}: {place} is not a Backend", remedy=f"repair {origin}")
    return found


def parse_options(name: str, cls: type[Backend], section: Mapping[str, object]) -> BaseModel:
    """Check a section against a backend's options.

    Raises:
        ConfigError: names each key that is wrong, with its value and the reason.
    """
    try:
        return cls.options.model_validate(dict(section))
    except ValidationError as exc:
        raise ConfigError(
            "; ".join(_describe(name, error) for error in exc.errors(include_url=False)),
            remedy=f"keys of [backends.{name}]: {', '.join(cls.options.model_fields)}",
        ) from exc


def create_backends(sections: Mapping[str, Mapping[str, object]]) -> dict[str, Backend]:
    """Construct a backend for each section, not started, in an order in which they can be started.

    Args:
        sections: by name, the keys below ``[backends.<name>]``.

    Raises:
        ConfigError, Unsupported: see ``load_backend`` and ``parse_options``. Nothing is left behind.
    """
    classes = {name: load_backend(name) for name in sections}
    options = {name: parse_options(name, classes[name], section) for name, section in sections.items()}
    backends: dict[str, Backend] = {}
    for name, cls in classes.items():
        if not issubclass(cls, BackendDecorator):
            backends[name] = cls(options[name])  # type: ignore[call-arg]  # a convention that an ABC cannot state
    for name, cls in classes.items():
        if issubclass(cls, BackendDecorator):
            inner_name = cls.wraps(options[name])
            shared = backends.get(inner_name)
            inner = _create_inner(name, inner_name) if shared is None else shared
            backends[name] = cls(options[name], inner, owns_inner=shared is None)
    return backends


def _create_inner(name: str, inner_name: str) -> Backend:
    cls = load_backend(inner_name)
    if issubclass(cls, BackendDecorator):
        raise ConfigError(
            f"backends.{name}.inner is {inner_name!r}, which wraps a backend itself",
            remedy="wrap a backend that moves bytes",
        )
    return cls(parse_options(inner_name, cls, {}))  # type: ignore[call-arg]  # as above


def _find(name: str) -> tuple[str, str]:
    if name in BUILT_IN:
        return BUILT_IN[name], "xferd"
    points = list(entry_points(group=ENTRY_POINTS, name=name))
    if not points:
        raise ConfigError(
            f"no backend is called {name!r}",
            limit=f"one of {', '.join(known_backends())}",
            remedy=f"correct the section [backends.{name}], or install the package that brings it",
        )
    origins = sorted({point.dist.name if point.dist else point.value for point in points})
    if len({point.value for point in points}) > 1:
        raise ConfigError(f"backend {name!r} is offered by {' and '.join(origins)}", remedy="uninstall all but one")
    return points[0].value, origins[0]


def _describe(name: str, error: ErrorDetails) -> str:
    key = ".".join(("backends", name, *(str(part) for part in error["loc"])))
    given = error["input"]
    # Only what is short and no secret: a value mistaken for another key must not end up in a log.
    shown = f" (given {given!r})" if isinstance(given, bool | int | float) else ""
    return f"{key}: {error['msg']}{shown}"
