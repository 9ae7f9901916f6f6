"""Wire form of storage pools; part of ``wire.py``, which is what others import."""

from __future__ import annotations

from dataclasses import asdict

from xferd.api import types as t
from xferd.api._wire_core import build, text
from xferd.api.proto import xferd_v1_pb2 as pb


def storage_to_message(info: t.StorageInfo) -> pb.StoragePool:
    """Return the wire form."""
    fields = asdict(info)
    fields["directories"] = [_directory_to_message(each) for each in info.directories]
    return build(pb.StoragePool, **fields)


def storage_from_message(message: pb.StoragePool) -> t.StorageInfo:
    """Return the record."""
    return t.StorageInfo(
        pool=message.pool,
        checksum=message.checksum,
        verify=message.verify,
        block_nbytes=message.block_nbytes,
        extents=message.extents,
        persistent_extents=message.persistent_extents,
        extents_nbytes=message.extents_nbytes,
        sealed_nbytes=message.sealed_nbytes,
        damaged_blocks=message.damaged_blocks,
        sealed_total_nbytes=message.sealed_total_nbytes,
        verified_total_nbytes=message.verified_total_nbytes,
        mismatches=message.mismatches,
        scrub_bytes_per_s=message.scrub_bytes_per_s,
        scrub_passes=message.scrub_passes,
        scrubbed_total_nbytes=message.scrubbed_total_nbytes,
        scrub_pass_ended_at=message.scrub_pass_ended_at,
        directories=tuple(_directory_from_message(each) for each in message.directories),
    )


def _directory_to_message(info: t.StorageDirectoryInfo) -> pb.StorageDirectory:
    return build(pb.StorageDirectory, **asdict(info) | {"path": text(info.path), "failure": text(info.failure)})


def _directory_from_message(message: pb.StorageDirectory) -> t.StorageDirectoryInfo:
    return t.StorageDirectoryInfo(
        path=message.path,
        uuid=message.uuid,
        weight=message.weight,
        nbytes=message.nbytes,
        used_nbytes=message.used_nbytes,
        slabs=message.slabs,
        extents=message.extents,
        journal_nbytes=message.journal_nbytes,
        journal_batches=message.journal_batches,
        failure=message.failure,
        was_clean=message.was_clean,
        torn_nbytes=message.torn_nbytes,
        recovered_extents=message.recovered_extents,
        unsealed_extents=message.unsealed_extents,
    )
