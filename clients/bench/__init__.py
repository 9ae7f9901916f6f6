"""``xferbench``: how fast this machine's daemons move bytes, beside memcpy, iperf3 and peers in the same run."""

from xferd.clients.bench._app import main

__all__ = ["main"]
