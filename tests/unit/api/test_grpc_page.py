"""docs/grpc.md names every call of the contract, service by service."""

from __future__ import annotations

import re
from pathlib import Path

from xferd.api.proto import xferd_v1_pb2 as pb

PAGE = (Path(__file__).resolve().parents[3] / "docs/grpc.md").read_text()


def test_every_call_is_in_the_table():
    rows = re.findall(r"^\| `(\w+Service)` \| (.*) \|$", PAGE, re.MULTILINE)
    assert {service: re.findall(r"`(\w+)`", calls) for service, calls in rows} == {
        service.name: [method.name for method in service.methods] for service in pb.DESCRIPTOR.services_by_name.values()
    }
