"""What the benchmark knows of files and objects without a daemon: kinds, stores, fio's depth."""

from __future__ import annotations

import http.client

import pytest

from xferd.api.errors import InvalidArgument
from xferd.clients.bench._cases import HOST_KINDS, KIB, KINDS, MIB, Case, Place
from xferd.clients.bench._fio import Fio, depth_of
from xferd.clients.bench._flows import kinds_of, regions_for
from xferd.clients.bench._kinds import KINDS as TABLE, kind_of, region_name
from xferd.clients.bench._nixl import NixlPosix
from xferd.clients.bench._plan import stand_in_for
from xferd.clients.bench._preadv import Preadv
from xferd.clients.bench._standard import choose, named_cases, references, standard_cases, with_references
from xferd.clients.bench._store import Store
from xferd.clients.bench._systems import NAMES, missing, systems_for
from xferd.clients.bench._xferd import Xferd

READ = Case(Place.LOCAL, "READ", MIB, 64, src="OBJECT", control="ring")


def test_kinds_are_one_table():
    assert set(TABLE) == set(KINDS)
    assert HOST_KINDS == ("DRAM", "MEMFD", "PRIVATE")
    assert all(kind.plain in ("", *TABLE) for kind in TABLE.values())


def test_a_kind_that_cannot_be_is_refused_with_the_reason():
    far = Case(Place.TCP, "READ", 4096, 1, src="OBJECT")
    assert "other nodes" in Xferd([far], Store()).refusal(far)
    assert "no store" in Xferd([READ]).refusal(READ)
    assert not Xferd([READ], Store()).refusal(READ)


def test_objects_have_the_size_of_a_request_and_so_a_region_each():
    other = Case(Place.LOCAL, "WRITE", 4096, 3, dst="OBJECT", control="ring")
    assert kinds_of(READ) == ("DRAM", f"OBJECT/{64 * MIB}")
    sizes = {need.kind: nbytes for need, nbytes in regions_for([READ, other]).items()}
    assert sizes[f"OBJECT/{64 * MIB}"] == 64 * MIB
    assert sizes["OBJECT/12288"] == 12288
    assert kind_of(region_name("OBJECT", 5)).name == "OBJECT"
    assert region_name("FILE", 5) == "FILE"


def test_checksums_are_held_against_none():
    case = Case(Place.LOCAL, "WRITE", MIB, 8, dst="STORAGE", control="ring")
    assert references(case)["no checksum"].dst == "STORAGE_PLAIN"
    assert "no checksum" not in references(READ)


def test_standard_is_a_pattern():
    found = choose(named_cases(), ["standard", "objects"])
    assert set(standard_cases()) <= set(found)
    assert {case.scenario for case in found} == {"", "small", "objects"}


@pytest.mark.parametrize(
    ("block", "batch", "order", "depth"),
    [
        (4 * KIB, 4096, "random", 128),
        (MIB, 1024, "sequential", 16),
        (4 * KIB, 8, "random", 8),
        (64 * MIB, 1, "random", 16),
    ],
)
def test_fio_has_as_many_requests_at_once_as_a_daemon(block, batch, order, depth):
    assert depth_of(Case(Place.LOCAL, "READ", block, batch, src="FILE_DIRECT", order=order)) == depth


def test_what_moves_the_other_way_is_no_files_case():
    """A WRITE takes bytes from the initiator: fio would write where xferd reads."""
    systems = Fio(lambda case: ""), Preadv(0), NixlPosix(0)
    for op, src, dst in (("WRITE", "FILE", "DRAM"), ("READ", "DRAM", "FILE"), ("READ", "FILE", "FILE")):
        case = Case(Place.LOCAL, op, KIB, 1, src=src, dst=dst)
        assert all(system.refusal(case).startswith("it moves") for system in systems), case.name
    taken = Case(Place.LOCAL, "READ", KIB, 1, src="FILE"), Case(Place.LOCAL, "WRITE", KIB, 1, dst="FILE")
    assert not any(system.refusal(case).startswith("it moves") for system in systems for case in taken)


@pytest.mark.parametrize("text", ["", "s3://x", "endpoint=http://x", "url=", "url=s3://b,region"])
def test_stores_that_make_no_sense(text):
    with pytest.raises(InvalidArgument, match="no store"):
        Store.parse(text)


def test_given_store_is_told_to_the_daemons():
    with Store.parse("url=s3://b/p,endpoint=http://h:1") as store:
        assert store.settings() == [
            "backends.object.stores.bench.url=s3://b/p",
            "backends.object.stores.bench.endpoint=http://h:1",
        ]


def test_blocks_in_order_go_to_systems_that_know_them():
    case = Case(Place.LOCAL, "READ", KIB, 8, src="FILE", order="sequential", control="ring")
    twin = stand_in_for(Preadv(0), case)
    assert isinstance(twin, Case)
    assert twin.order == "sequential"
    assert "with random blocks" in str(stand_in_for(NixlPosix(0), case))


def test_a_large_case_of_another_system_takes_no_memory():
    small = Case(Place.LOCAL, "READ", 4 * KIB, 16, src="FILE", control="ring")
    large = Case(Place.LOCAL, "READ", MIB, 1024, src="FILE_DIRECT", order="sequential", control="ring")
    preadv, memcpy, _ = systems_for(with_references([small, large]), ["preadv", "memcpy"])
    [alone] = systems_for(with_references([small]), ["preadv"])[:-1]
    assert preadv._region_nbytes == alone._region_nbytes == 256 * MIB, "as memcpy has for what it is held against"
    assert memcpy._region_nbytes == 1024 * MIB


def test_every_system_says_whether_it_is_there():
    assert all(isinstance(missing(name), str) for name in NAMES)


@pytest.mark.slow
def test_own_server_keeps_objects_ranges_parts_and_metadata():
    with Store() as store, store:
        connection = http.client.HTTPConnection(store.section["endpoint"].removeprefix("http://"), timeout=20)

        def ask(method, path, body=b"", **headers):
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers

        assert ask("PUT", "/b/k", bytes(range(100)), x_amz_meta_sum="1")[0] == 200
        status, body, headers = ask("GET", "/b/k", Range="bytes=10-19")
        assert (status, body, headers["Content-Range"]) == (206, bytes(range(10, 20)), "bytes 10-19/100")
        assert headers["x-amz-meta-sum"] == "1"
        first = headers["ETag"]
        upload = ask("POST", "/b/k?uploads")[1].decode().partition("<UploadId>")[2].partition("<")[0]
        for number, part in ((2, b"world"), (1, b"hello ")):
            ask("PUT", f"/b/k?partNumber={number}&uploadId={upload}", part)
        assert ask("GET", "/b/k")[1] == bytes(range(100)), "seen before its end"
        assert ask("POST", f"/b/k?uploadId={upload}", b"<x/>")[0] == 200
        status, body, headers = ask("GET", "/b/k")
        assert (status, body) == (200, b"hello world")
        assert headers["ETag"] != first
        assert ask("DELETE", "/b/k")[0] == 204
        assert ask("HEAD", "/b/k")[0] == 404
        connection.close()
