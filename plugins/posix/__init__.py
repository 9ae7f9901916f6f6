"""The ``posix`` backend: files of this node, through the page cache or past it."""

from xferd.plugins.posix.backend import PosixBackend
from xferd.plugins.posix.options import PosixOptions

__all__ = ["PosixBackend", "PosixOptions"]
