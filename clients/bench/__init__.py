"""``xferbench``: how fast this machine's daemons move bytes, beside memcpy and iperf3 of the same run."""

from xferd.clients.bench._app import main

__all__ = ["main"]
