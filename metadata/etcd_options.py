"""The options of the etcd store: the section ``[metadata.etcd]`` of the configuration.

Plain data: files that it names are read when the store connects (``etcd.py``), so that a configuration can be checked
on a machine that lacks them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    WithJsonSchema,
    field_validator,
    model_validator as checks_model,
)

from xferd.api.errors import InvalidArgument
from xferd.api.units import format_seconds, parse_seconds
from xferd.metadata._etcd_wire import Endpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_TTL_S = 2.0
MAX_TTL_S = 3600.0


def _seconds(value: object) -> float:
    try:
        return parse_seconds(value)
    except InvalidArgument as exc:  # pydantic collects ValueErrors and adds the key
        raise ValueError(str(exc)) from exc


# The same as plugins/options.py has; stores and backends do not import each other.
Seconds = Annotated[
    float,
    BeforeValidator(_seconds),
    PlainSerializer(format_seconds, return_type=str, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number", "minimum": 0}], "examples": ["10s"]}),
]


class EtcdOptions(BaseModel):
    """How to reach etcd, and what a node promises there.

    Attributes:
        endpoints: "host:port", "http://host:port" or "https://host:port"; all members of one etcd cluster.
        namespace: the prefix of all keys; two clusters of xferd share an etcd by having different ones.
        ttl: of the lease that a node's keys are under: so long after its last sign of life a node counts as gone.
        dial_timeout: for the first contact with one endpoint.
        request_timeout: for one operation on the store, retries on other endpoints included.
        tls_ca: file of the certificates that etcd's is checked against; "" means the system's.
        tls_cert: file of our certificate chain, where etcd wants one.
        tls_key: file of its key.
        user: for etcd's own authentication; "" does without.
        password_file: file with the password, trailing white space ignored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)

    endpoints: tuple[str, ...] = ("127.0.0.1:2379",)
    namespace: str = "/xferd"
    ttl: Seconds = 10.0
    dial_timeout: Seconds = 2.0
    request_timeout: Seconds = 3.0
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    user: str = ""
    password_file: str = ""

    @field_validator("endpoints")
    @classmethod
    def _known_forms(cls, endpoints: Sequence[str]) -> tuple[str, ...]:
        if not endpoints:
            raise ValueError("no endpoint is given; give host:port of each member of the etcd cluster")
        parsed = [Endpoint.parse(text) for text in endpoints]
        if len({(endpoint.host, endpoint.port) for endpoint in parsed}) < len(parsed):
            raise ValueError("an endpoint is given twice")
        if len({endpoint.tls for endpoint in parsed if endpoint.tls is not None}) > 1:
            raise ValueError("http:// and https:// endpoints are mixed")
        return tuple(endpoints)

    @field_validator("namespace")
    @classmethod
    def _plain_namespace(cls, namespace: str) -> str:
        # Other prefixes would work too, but then "/a" and "/a/" would look alike and be two clusters.
        if not namespace.startswith("/") or namespace.endswith("/") or "//" in namespace or not namespace.isprintable():
            raise ValueError(f"namespace {namespace!r} must begin with / and neither end with it nor have two in a row")
        return namespace

    @checks_model(mode="after")
    def _consistent(self) -> Self:
        if not MIN_TTL_S <= self.ttl <= MAX_TTL_S:
            raise ValueError(f"ttl {self.ttl:g}s is out of range: {MIN_TTL_S:g}s to {MAX_TTL_S:g}s")
        if not 0 < self.request_timeout <= self.ttl / 3:
            raise ValueError(
                f"request_timeout {self.request_timeout:g}s must be more than 0 and at most a third of the ttl "
                f"({self.ttl / 3:g}s), or one lost request could cost the lease"
            )
        if not 0 < self.dial_timeout <= self.request_timeout:
            raise ValueError(f"dial_timeout {self.dial_timeout:g}s must be more than 0 and at most request_timeout")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key go together")
        if self.tls_ca or self.tls_cert:
            plain = [text for text in self.endpoints if Endpoint.parse(text).tls is False]
            if plain:
                raise ValueError(f"endpoint {plain[0]} says http://, but tls_ca or tls_cert is set")
        if bool(self.user) != bool(self.password_file):
            raise ValueError("user and password_file go together")
        return self

    @property
    def uses_tls(self) -> bool:
        """True where an endpoint says https:// or a TLS file is named."""
        return bool(self.tls_ca or self.tls_cert) or any(Endpoint.parse(text).tls for text in self.endpoints)
