"""The REST face: adapters over the Engine protocol, imported by the daemon only."""

from xferd.api.rest.face import RestFace

__all__ = ["RestFace"]
