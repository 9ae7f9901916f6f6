"""A process that registers one node in etcd and lives on: to be stopped and killed by tests.

    python etcd_node.py ENDPOINT NAMESPACE TTL_S NAME ID EPOCH

Says "ready" when it is registered; ends in order when its standard input does.
"""

from __future__ import annotations

import asyncio
import sys

from xferd.api.types import NodeInfo
from xferd.metadata.etcd import EtcdStore
from xferd.metadata.etcd_options import EtcdOptions


def node(name: str, node_id: str, epoch: int, agents: tuple[str, ...] = ("decode",)) -> NodeInfo:
    return NodeInfo(name, node_id, epoch, "0.1.0", ("tcp://127.0.0.1:7000",), ("local", "tcp"), (), agents, 1.0)


async def main(endpoint: str, namespace: str, ttl_s: float, name: str, node_id: str, epoch: int) -> None:
    options = EtcdOptions(
        endpoints=(endpoint,), namespace=namespace, ttl=ttl_s, request_timeout=ttl_s / 4, dial_timeout=ttl_s / 4
    )
    store = EtcdStore(options)
    await store.start()
    await store.publish(node(name, node_id, epoch))
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await store.aclose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4], sys.argv[5], int(sys.argv[6])))
