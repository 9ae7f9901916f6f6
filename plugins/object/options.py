"""The section ``[backends.object]`` and, below it, one table for each store.

No key holds a secret: credentials come from the environment, from files that a key names, or from the machine's
metadata service (``credentials.py``). An address that carries one is refused, and not repeated in the refusal.
"""

from __future__ import annotations

import re
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, field_validator, model_validator

from xferd.plugins.options import Nbytes, Options, Seconds

MIB = 1 << 20
MIN_PART_NBYTES = 5 * MIB
"""S3 takes no smaller part, except as the last one."""

SCHEMES = ("s3", "gs", "az", "file", "memory")
_ADDRESS = re.compile(r"^https?://[^\s/?#@]+(/[^\s?#@]*)?$")

StoreName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class StoreOptions(Options):
    """``[backends.object.stores.NAME]``: one bucket, container or directory, or a prefix in it.

    ``url`` is ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``, ``file:///directory`` or
    ``memory:///``. ``request_timeout`` is for one attempt, ``retry_timeout`` for all attempts of one request.
    ``direct_gets``: what an ``http://`` endpoint that speaks S3 sends goes straight to its places (``direct.py``).
    """

    url: str
    endpoint: str = ""
    region: str = ""
    account: str = ""
    credentials_file: str = ""
    profile: str = ""
    ca_file: str = ""
    anonymous: bool = False
    allow_http: bool = False
    virtual_hosted: bool = False
    read_only: bool = False
    direct_gets: bool = True
    max_concurrency: int = Field(32, ge=1, le=1024)
    connect_timeout: Annotated[Seconds, Field(gt=0)] = 5.0
    request_timeout: Annotated[Seconds, Field(gt=0)] = 30.0
    max_retries: int = Field(8, ge=0, le=100)
    retry_timeout: Annotated[Seconds, Field(gt=0)] = 60.0

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        parts = _split(url)
        if parts.scheme not in SCHEMES:
            raise ValueError(f"the scheme must be one of {', '.join(SCHEMES)}")
        if "@" in url or parts.query or parts.fragment:
            raise ValueError("holds more than a place; credentials belong into credentials_file, or the environment")
        if parts.scheme in ("file", "memory"):
            if parts.netloc or (parts.scheme == "file" and not parts.path.startswith("/")):
                raise ValueError("a directory is file:///with/its/whole/path, memory is memory:///")
        elif not parts.netloc:
            raise ValueError("names no bucket or container")
        return url

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str) -> str:
        if endpoint and not _ADDRESS.match(endpoint):
            raise ValueError("must be http://host:port or https://host:port, with no user and no query")
        return endpoint

    @model_validator(mode="after")
    def _check_together(self) -> StoreOptions:
        if self.endpoint.startswith("http://") and not self.allow_http:
            raise ValueError("endpoint is http and allow_http is false: requests would not be encrypted")
        if self.profile and self.scheme != "s3":
            raise ValueError("profile is for s3 alone")
        if self.scheme == "az" and not self.account:
            raise ValueError("az needs account, the name of the storage account")
        return self

    @property
    def scheme(self) -> str:
        """Which kind of store it is: one of ``SCHEMES``."""
        return _split(self.url).scheme

    @property
    def bucket(self) -> str:
        """The bucket or container; "" for a directory and for memory."""
        return _split(self.url).netloc

    @property
    def path(self) -> str:
        """The directory, or the prefix of all keys, without slashes at its ends ("" for none)."""
        path = _split(self.url).path
        return path if self.scheme == "file" else path.strip("/")


class ObjectOptions(Options):
    """``[backends.object]``.

    ``read_memory`` and ``write_memory`` bound what is in flight, over all stores: a get's bytes until they are in
    place, an upload's parts until the store has them.
    """

    stores: dict[StoreName, StoreOptions] = Field(default_factory=dict)
    read_memory: Annotated[Nbytes, Field(ge=MIB)] = 128 * MIB
    write_memory: Annotated[Nbytes, Field(ge=3 * MIN_PART_NBYTES)] = 128 * MIB
    read_range: Annotated[Nbytes, Field(ge=MIB, le=1 << 30)] = 8 * MIB
    merge_gap: Annotated[Nbytes, Field(ge=0, le=16 * MIB)] = 256 << 10
    part: Annotated[Nbytes, Field(ge=MIN_PART_NBYTES, le=1 << 30)] = 8 * MIB
    upload_parts: int = Field(4, ge=1, le=64)
    checksum: bool = True
    movers: int = Field(2, ge=1, le=64)

    @model_validator(mode="after")
    def _check_memory(self) -> ObjectOptions:
        if self.read_range > self.read_memory:
            raise ValueError("read_range does not fit into read_memory: lower the one or raise the other")
        if 3 * self.part > self.write_memory:
            raise ValueError("three parts do not fit into write_memory: lower part or raise write_memory")
        return self


def _split(url: str) -> SplitResult:
    return urlsplit(url)
