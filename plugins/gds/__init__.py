"""The ``gds`` backend: files to GPU memory and back with GPUDirect Storage, by kvikio in the device workers."""

from xferd.plugins.gds.backend import GdsBackend, GdsOptions

__all__ = ["GdsBackend", "GdsOptions"]
