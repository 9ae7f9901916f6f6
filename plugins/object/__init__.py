"""Objects in S3, Google Cloud Storage, Azure, a local directory or memory. ``docs/objects.md`` describes it."""

from xferd.plugins.object.backend import ObjectBackend
from xferd.plugins.object.options import ObjectOptions, StoreOptions

__all__ = ["ObjectBackend", "ObjectOptions", "StoreOptions"]
