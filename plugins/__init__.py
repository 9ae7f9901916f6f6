"""How bytes move: the Backend interface, the registry, one module or folder a backend."""

from xferd.plugins.base import (
    Backend,
    BackendStatistics,
    Chunk,
    Extent,
    FileSpace,
    MappedSpace,
    ProcessSpace,
    RemoteSpace,
    Space,
    SpaceKind,
)
from xferd.plugins.decorator import BackendDecorator
from xferd.plugins.movers import MoveCounter, MoverPool
from xferd.plugins.options import Nbytes, Options, Seconds
from xferd.plugins.registry import create_backends, known_backends

__all__ = [
    "Backend",
    "BackendDecorator",
    "BackendStatistics",
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
]
