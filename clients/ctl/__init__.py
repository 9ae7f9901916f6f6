"""The command line for operators; see docs/xferctl.md."""

from xferd.clients.ctl._app import main

__all__ = ["main"]
