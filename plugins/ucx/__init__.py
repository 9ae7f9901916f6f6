"""The backend for fabrics: UCX, called by its C interface."""

from xferd.plugins.ucx.backend import UcxBackend
from xferd.plugins.ucx.options import UcxOptions

__all__ = ["UcxBackend", "UcxOptions"]
