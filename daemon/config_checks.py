"""What must hold between keys of the configuration, beyond the type and range of each one.

Pure: no file is opened and no address is looked up, so that ``--validate-config`` says the same on any machine.
"""

from __future__ import annotations

import ipaddress
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xferd.api.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xferd.daemon.config_tree import Config

MAX_SOCKET_PATH_NBYTES = 107
"""``sun_path`` has 108 bytes, one of them the closing NUL."""


MAX_DEVICE_POOL_NBYTES = 1 << 40
"""A position in GPU memory has 40 bits for the offset."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A key whose value does not go with another one."""

    key: str
    message: str
    remedy: str


def check(config: Config) -> list[Problem]:
    """Return all problems, not only the first: each start that fails costs somebody a minute."""
    return [
        *_check_listeners(config),
        *_check_tls(config),
        *_check_pools(config),
        *_check_device_pools(config),
        *_check_storage_pools(config),
        *_check_sizes(config),
        *_check_peers(config),
        *_check_paths(config),
    ]


def split_address(text: str) -> tuple[str, int]:
    """Split "host:port" ("[::1]:80" for IPv6); an empty host means every interface.

    Raises:
        ConfigError: no port, or one outside 0 to 65535, or an IPv6 address without brackets.
    """
    host, colon, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else -1
    if not colon or not 0 <= number <= 65535 or (":" in host and not is_bracketed) or any(c.isspace() for c in host):
        raise ConfigError(f"{text!r} is no host:port", limit="port 0 to 65535", remedy="127.0.0.1:9480, or [::1]:9480")
    return (host[1:-1] if is_bracketed else host), number


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches the address; a name other than localhost is taken to be public."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_listeners(config: Config) -> Iterator[Problem]:
    grpc_locked = bool(config.grpc.token_file or config.grpc.tls_client_ca)
    faces = (
        ("grpc.listen", config.grpc.listen, grpc_locked, "set grpc.token_file or grpc.tls_client_ca"),
        ("rest.listen", config.rest.listen, bool(config.rest.token_file), "set rest.token_file"),
    )
    for key, listen, is_locked, remedy in faces:
        if not listen:
            continue
        try:
            host, _ = split_address(listen)
        except ConfigError as exc:
            yield Problem(key, exc.message, exc.remedy)
            continue
        if not is_locked and not is_loopback(host):
            yield Problem(
                key,
                f"{listen!r} can be reached from other machines, and nobody is asked who they are",
                f"{remedy}, or listen on 127.0.0.1",
            )
    tcp = config.active_backends().get("tcp")
    if tcp is not None and not tcp.get("secret_file"):
        cause = "backends.tcp.listen is set" if tcp.get("listen") else "peers are configured"
        if config.metadata.store == "etcd" and not tcp.get("listen"):
            cause = "peers come from etcd"
        yield Problem(
            "backends.tcp.secret_file",
            f"{cause}, and nodes prove themselves to each other with a secret",
            "name a file that holds the same secret on every node",
        )


def _check_tls(config: Config) -> Iterator[Problem]:
    grpc = config.grpc
    if bool(grpc.tls_cert) != bool(grpc.tls_key):
        missing = "tls_key" if grpc.tls_cert else "tls_cert"
        yield Problem(f"grpc.{missing}", "a certificate and its key go together", f"set grpc.{missing} too")
    if grpc.tls_client_ca and not grpc.tls_cert:
        yield Problem("grpc.tls_client_ca", "clients are checked over TLS only", "set grpc.tls_cert and grpc.tls_key")


def _check_pools(config: Config) -> Iterator[Problem]:
    if not config.pools:
        yield Problem("pools", "the list is empty", "configure one pool at least, or leave the key out")
    names = [*(pool.name for pool in config.pools), *(pool.name for pool in config.storage_pools)]
    for name, count in Counter(names).items():
        if count > 1:
            yield Problem("pools", f"{count} pools have the name {name!r}", "give each pool a name of its own")


def _check_device_pools(config: Config) -> Iterator[Problem]:
    cuda = config.active_backends().get("cuda")
    devices = None if cuda is None else cuda.get("devices")
    for number, pool in enumerate(config.pools):
        key = f"pools[{number}]"
        if pool.kind != "VRAM":
            if pool.device:
                yield Problem(f"{key}.device", "a pool of this machine's memory has no GPU", "set kind = 'VRAM'")
            continue
        if cuda is None:
            yield Problem(f"{key}.kind", "VRAM needs a backend for GPUs", "add a section [backends.cuda]")
        if devices and pool.device not in devices:
            yield Problem(
                f"{key}.device",
                f"GPU {pool.device} is none of backends.cuda.devices, {list(devices)}",
                "add it there, or name one of them",
            )
        if pool.nbytes >= MAX_DEVICE_POOL_NBYTES:
            yield Problem(f"{key}.nbytes", f"{pool.nbytes} bytes of VRAM", "make a pool of less than 1 TiB")
        if pool.huge_pages or "collapse" in pool.model_fields_set:
            yield Problem(
                f"{key}.huge_pages" if pool.huge_pages else f"{key}.collapse",
                "GPU memory has no pages of this machine",
                "leave it out",
            )


def _check_storage_pools(config: Config) -> Iterator[Problem]:
    paths: Counter[str] = Counter()
    for number, pool in enumerate(config.storage_pools):
        key = f"storage_pools[{number}]"
        if not pool.directories:
            yield Problem(f"{key}.directories", "the list is empty", "name a directory at least")
        if pool.block_nbytes % 4096:
            yield Problem(f"{key}.block_nbytes", f"{pool.block_nbytes} is not a multiple of 4096", "use 64KiB to 1MiB")
        if pool.verify and pool.checksum == "off":
            yield Problem(f"{key}.verify", "there is nothing to compare with checksum = 'off'", "set checksum = 'xxh3'")
        paths.update(os.path.normpath(each.path) for each in pool.directories)
        for each in pool.directories:
            share = pool.nbytes * each.weight / sum(other.weight for other in pool.directories)
            if share < 4096:
                yield Problem(
                    f"{key}.directories",
                    f"{each.path!r} gets {share:.0f} bytes by its weight",
                    "raise its weight, or the pool's nbytes",
                )
            if not each.path.startswith("/"):
                yield Problem(f"{key}.directories", f"{each.path!r} is not absolute", "write the whole path, from /")
    for path, count in paths.items():
        if count > 1:
            yield Problem("storage_pools", f"{path!r} is named {count} times", "name each directory once")


def _check_sizes(config: Config) -> Iterator[Problem]:
    transfers, limits = config.transfers, config.limits
    if transfers.chunk > transfers.staging:
        yield Problem(
            "transfers.chunk",
            f"a chunk of {transfers.chunk} bytes does not fit into transfers.staging, {transfers.staging} bytes",
            "lower transfers.chunk or raise transfers.staging",
        )
    if limits.max_notification > limits.max_inbox:
        yield Problem(
            "limits.max_notification",
            f"a notification of {limits.max_notification} bytes does not fit into an inbox of {limits.max_inbox}",
            "lower limits.max_notification or raise limits.max_inbox",
        )
    if limits.max_notification >= config.grpc.max_message:
        yield Problem(
            "limits.max_notification",
            f"{limits.max_notification} bytes and their envelope pass grpc.max_message, {config.grpc.max_message}",
            "lower limits.max_notification or raise grpc.max_message",
        )


def _check_peers(config: Config) -> Iterator[Problem]:
    key = "metadata.embedded.peers"
    peers = config.metadata.embedded.peers
    if peers and config.metadata.store != "embedded":
        yield Problem(key, f"metadata.store is {config.metadata.store!r}, which finds peers by itself", "leave it out")
    for name, count in Counter(peer.name for peer in peers).items():
        if count > 1:
            yield Problem(key, f"{count} peers have the name {name!r}", "name each peer once")
        if name == config.node_name:
            yield Problem(key, f"{name!r} is this node itself", "leave it out, or set node.name")
    for peer in peers:
        scheme, _, address = peer.address.rpartition("://")
        try:
            host, port = split_address(address)
        except ConfigError as exc:
            yield Problem(key, f"peer {peer.name!r}: {exc.message}", "tcp://host:port")
            continue
        if scheme != "tcp" or not host or not port:
            yield Problem(key, f"peer {peer.name!r}: {peer.address!r} is no address to call", "tcp://host:port")


def _check_paths(config: Config) -> Iterator[Problem]:
    sockets = {
        "sessions.socket": config.session_socket,
        "grpc.socket": config.grpc_socket,
        "rest.socket": config.rest_socket,
    }
    for key, path in sockets.items():
        nbytes = len(os.fsencode(path))
        if nbytes > MAX_SOCKET_PATH_NBYTES:
            yield Problem(
                key,
                f"{str(path)!r} has {nbytes} bytes and the kernel takes {MAX_SOCKET_PATH_NBYTES}",
                "set a shorter node.run_dir",
            )
    for path, count in Counter(sockets.values()).items():
        if count > 1:
            keys = [key for key, other in sockets.items() if other == path]
            yield Problem(keys[-1], f"{str(path)!r} is also the path of {keys[0]}", "give each socket its own path")
    absolute = [("files.roots", root) for root in config.files.roots] + [("node.run_dir", str(config.run_dir))]
    for key, text in absolute:
        if not text.startswith("/"):
            yield Problem(key, f"{text!r} is not absolute", "write the whole path, from /")
