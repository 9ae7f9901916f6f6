"""Hosts on one switch, as network namespaces: two of them can be cut off from each other and see the others still.

All of it is private to the test: the switch is a bridge in a namespace of its own, and no packet leaves it. Needs root.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from typing import Self

_numbers = itertools.count()


class Unable(Exception):
    """Namespaces cannot be made here; the message says why."""


class Switch:
    """A context in which hosts are plugged in; the namespace of the switch has the address ``10.99.0.1``."""

    address = "10.99.0.1"

    def __init__(self) -> None:
        self._name = f"xf-{os.getpid()}-{next(_numbers)}"
        self._hosts: list[str] = []
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise Unable("network namespaces need root")
        if shutil.which("ip") is None:
            raise Unable("the command ip is missing: apt-get install iproute2")
        try:
            self._namespace(self._name)
            _ip("-n", self._name, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._name, "addr", "add", f"{self.address}/24", "dev", "br0")
            _ip("-n", self._name, "link", "set", "br0", "up")
        except subprocess.CalledProcessError as exc:
            self._undo.close()
            raise Unable(f"no network namespace can be made here: {exc.stderr.strip()}") from exc
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def prefix(self, host: str = "") -> tuple[str, ...]:
        """Return the command before a command that makes it run at a host, or in the switch."""
        return ("ip", "netns", "exec", self._at(host))

    def plug(self, host: str) -> str:
        """Add a host and return its address."""
        self._hosts.append(host)
        address = f"10.99.0.{len(self._hosts) + 1}"
        name = self._at(host)
        self._namespace(name)
        _ip("-n", self._name, "link", "add", "name", _port(host), "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", self._name, "link", "set", _port(host), "master", "br0", "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        return address

    def cut(self, *hosts: str) -> None:
        """Lose every packet between these hosts without a word; others reach them, and they reach others."""
        self._isolate(hosts, "on")

    def heal(self, *hosts: str) -> None:
        self._isolate(hosts, "off")

    def _isolate(self, hosts: tuple[str, ...], state: str) -> None:
        for host in hosts:
            _ip("-n", self._name, "link", "set", _port(host), "type", "bridge_slave", "isolated", state)

    def _at(self, host: str) -> str:
        return f"{self._name}-{host}" if host else self._name

    def _namespace(self, name: str) -> None:
        _ip("netns", "add", name)
        self._undo.callback(_ip, "netns", "del", name)
        _ip("-n", name, "link", "set", "lo", "up")


def _port(host: str) -> str:
    return f"port-{host}"  # a bare "a" would be taken for an option of ip


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)
