"""What the demonstration's two sides tell each other arrives as it was sent; what it prints has the promised form."""

import json

import pytest

from xferd.api.types import Hop
from xferd.clients.demo.handover import CacheOffer, Handover
from xferd.clients.demo.paging import Geometry
from xferd.clients.demo.report import Row, Screen, Summary, route_text

SUMMARY = Summary(
    tokens_equal=True,
    logits_equal=False,
    kv_nbytes=49_397_760,
    blocks=4020,
    transfer_ms=48.23849,
    file_ms=14.0,
    ttft_transfer_ms=172.9,
    ttft_recompute_ms=1904.5,
)


def test_an_offer_arrives():
    offer = CacheOffer(Geometry(30, 3, 64, 16, 134), (2**32 + 1, 5))
    assert CacheOffer.from_bytes(offer.to_bytes()) == offer


@pytest.mark.parametrize("handover", [Handover((1, 2, 3), (9, 0, 4)), Handover((1, 2, 3), file="/some/where/ünd.kv")])
def test_a_hand_over_arrives(handover):
    assert Handover.from_bytes(handover.to_bytes()) == handover
    assert handover.cached_tokens == 2


@pytest.mark.parametrize(
    "raw", [b"", b"taken", b"[]", b'{"tokens": 3}', b'{"tokens": [1], "table": [null], "file": ""}']
)
def test_rubbish_is_no_hand_over(raw):
    with pytest.raises((ValueError, KeyError, TypeError)):
        Handover.from_bytes(raw)


def test_the_last_line_has_the_promised_keys_and_no_others(capsys):
    Screen(quiet=True).last_line(SUMMARY)
    [line] = capsys.readouterr().out.splitlines()
    assert list(json.loads(line)) == [
        "tokens_equal",
        "logits_equal",
        "kv_nbytes",
        "blocks",
        "transfer_ms",
        "file_ms",
        "ttft_transfer_ms",
        "ttft_recompute_ms",
    ]
    assert json.loads(line)["logits_equal"] is False
    assert json.loads(line)["transfer_ms"] == 48.238


def test_the_table_has_every_cell(capsys):
    row = Row("READ by b", "4,020", "49,397,760", "48.2", "1.02", "DRAM@a -tcp-> DRAM@b")
    Screen().table("KV cache", [row])
    printed = capsys.readouterr().out
    assert all(cell in printed for cell in ("READ by b", "4,020", "49,397,760", "48.2", "1.02", row.route))


def test_a_route_is_told_hop_by_hop():
    hops = (Hop("posix", "FILE@a", "DRAM@a", "why"), Hop("tcp", "DRAM@a", "DRAM@b", "why"))
    assert route_text(hops) == "FILE@a -posix-> DRAM@a -tcp-> DRAM@b"
    assert route_text(()) == ""
