"""Key names are unambiguous whatever nodes and agents are called."""

from __future__ import annotations

from hypothesis import given, strategies as st

from xferd.metadata.keys import Keys

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
KEYS = Keys()


@given(NAMES)
def test_a_node_is_read_back_from_its_key(name: str) -> None:
    key = KEYS.node(name)
    assert key.startswith(KEYS.nodes)
    assert KEYS.node_name(key) == name


@given(NAMES, NAMES, NAMES, NAMES)
def test_agents_keys_collide_only_if_both_names_are_equal(node: str, agent: str, node2: str, agent2: str) -> None:
    assert (KEYS.agent(node, agent) == KEYS.agent(node2, agent2)) == ((node, agent) == (node2, agent2))
    assert KEYS.agent(node, agent).startswith(KEYS.agents_of(node))
    assert KEYS.agent(node, agent).startswith(KEYS.agents_of(node2)) == (node == node2)


@given(NAMES, NAMES)
def test_all_keys_of_a_node_have_its_prefix_and_no_other_nodes(node: str, other: str) -> None:
    for key in (KEYS.node(other), KEYS.agent(other, "x")):
        assert key.startswith(KEYS.of_node(node)) == (node == other)
        assert key.startswith(KEYS.of_node(""))


@given(NAMES, NAMES, NAMES, NAMES)
def test_an_agent_is_read_back_and_a_blob_is_none(node: str, agent: str, node2: str, label: str) -> None:
    assert KEYS.parse(KEYS.agent(node, agent)) == (node, agent)
    assert KEYS.parse(KEYS.blob(node2, label)) is None
    assert (KEYS.blob(node, agent) == KEYS.blob(node2, label)) == ((node, agent) == (node2, label))


def test_foreign_keys_name_no_node() -> None:
    assert KEYS.node_name("/other/v1/nodes/a") is None
    assert KEYS.node_name(KEYS.nodes) is None
    assert KEYS.node_name(KEYS.agent("a", "b")) is None
    assert KEYS.node_name(KEYS.nodes + "a/b") is None
    assert KEYS.node_name(KEYS.nodes + "/record") is None
    assert KEYS.parse(KEYS.agents_of("a")) is None
    assert Keys("/two").node_name(KEYS.node("a")) is None
