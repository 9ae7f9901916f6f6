"""The ``local`` backend: host memory to host memory on one node."""

from xferd.plugins.local.backend import LocalBackend, LocalOptions

__all__ = ["LocalBackend", "LocalOptions"]
