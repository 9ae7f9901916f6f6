"""How bytes move: the Backend interface, the registry, one module or folder a backend.

Names are imported when they are first asked for: a device worker, which is a process of its own and to be up quickly,
imports modules of this package but neither the registry nor what options are checked with.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xferd.plugins.base import (
        Backend,
        BackendStatistics,
        Begun,
        Chunk,
        Extent,
        FileSpace,
        MappedSpace,
        ProcessSpace,
        RemoteSpace,
        Space,
        SpaceKind,
    )
    from xferd.plugins.begun import told
    from xferd.plugins.decorator import BackendDecorator
    from xferd.plugins.movers import MoveCounter, MoverPool
    from xferd.plugins.options import Nbytes, Options, Seconds
    from xferd.plugins.registry import create_backends, known_backends

__all__ = [
    "Backend",
    "BackendDecorator",
    "BackendStatistics",
    "Begun",
    "Chunk",
    "Extent",
    "FileSpace",
    "MappedSpace",
    "MoveCounter",
    "MoverPool",
    "Nbytes",
    "Options",
    "ProcessSpace",
    "RemoteSpace",
    "Seconds",
    "Space",
    "SpaceKind",
    "create_backends",
    "known_backends",
    "told",
]

_MODULES = {
    "BackendDecorator": "decorator",
    "MoveCounter": "movers",
    "MoverPool": "movers",
    "Nbytes": "options",
    "Options": "options",
    "Seconds": "options",
    "create_backends": "registry",
    "known_backends": "registry",
    "told": "begun",
}
"""Where names are that are not in ``base``."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'base')}"), name)
