"""No request reaches another epoch: what was prepared against the old one fails, and can be prepared again."""

from __future__ import annotations

import pytest

from xferd.api.descriptors import DescriptorList, PreparedRef
from xferd.api.errors import Stale
from xferd.api.types import Access, MemoryKind, PreparedHandle, RegionId, RegionInfo, RegionSource, SessionId
from xferd.daemon.engine.lists import ListBook
from xferd.daemon.memory.regions import RegionTable
from xferd.plugins.base import PeerIdentity

REGION = RegionId(1 << 32 | 5)
MINE = SessionId("mine")


class Remote:
    """Another node, which can be restarted."""

    def __init__(self) -> None:
        self.epoch = 1

    async def resolve(self, name: str) -> PeerIdentity:
        return PeerIdentity(name, "id", self.epoch)

    async def remote_regions(self, name: str, ids: list[RegionId]) -> dict[RegionId, RegionInfo]:
        return {
            region: RegionInfo(
                id=region,
                node=name,
                epoch=self.epoch,
                kind=MemoryKind.DRAM,
                source=RegionSource.POOL,
                device=0,
                nbytes=4096,
                agent="x",
                access=Access.READ,
                writable=True,
            )
            for region in ids
        }


def rows(epoch: int = 0) -> DescriptorList:
    return DescriptorList.from_rows([(REGION, 0, 64), (REGION, 64, 64)], node="b", epoch=epoch)


@pytest.fixture
def remote() -> Remote:
    return Remote()


@pytest.fixture
def book(remote: Remote) -> ListBook:
    return ListBook("a", 9, RegionTable("a", 9, 16), remote, max_prepared=8)


async def test_a_prepared_list_of_an_old_epoch_is_stale_and_can_be_prepared_again(
    book: ListBook, remote: Remote
) -> None:
    handle = (await book.prepare(MINE, rows(), 0.0)).handle
    assert (await book.checked(MINE, PreparedRef(handle))).epoch == 1
    remote.epoch = 2
    with pytest.raises(Stale, match=r"epoch 1 of node b, which is at epoch 2.*prepare again"):
        await book.checked(MINE, PreparedRef(handle))
    again = await book.prepare(MINE, rows(), 0.0)
    assert (again.epoch, (await book.checked(MINE, PreparedRef(again.handle))).epoch) == (2, 2)
    with pytest.raises(Stale):
        await book.checked(MINE, PreparedRef(PreparedHandle(handle)))


async def test_a_list_that_names_an_old_epoch_is_stale(book: ListBook, remote: Remote) -> None:
    assert len(await book.check(rows(epoch=1))) == 2
    remote.epoch = 2
    with pytest.raises(Stale, match="epoch 2"):
        await book.check(rows(epoch=1))
    with pytest.raises(Stale):
        await book.prepare(MINE, rows(epoch=1), 0.0)
    assert book.entries() == []
