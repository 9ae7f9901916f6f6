"""Options that could not work together are refused when they are read, with what to change."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from xferd.metadata.etcd_options import EtcdOptions


def test_defaults_hold_together() -> None:
    options = EtcdOptions()
    assert (options.ttl, options.namespace, options.uses_tls) == (10.0, "/xferd", False)
    assert options.ttl / 3 + 2 * options.request_timeout <= options.ttl


def test_durations_are_written_as_people_do() -> None:
    options = EtcdOptions.model_validate({"ttl": "1m", "request_timeout": "2500ms"})
    assert (options.ttl, options.request_timeout) == (60.0, 2.5)
    assert options.model_dump(mode="json")["ttl"] == "1m"


def test_https_and_files_mean_tls() -> None:
    assert EtcdOptions(endpoints=("https://a:1",)).uses_tls
    assert EtcdOptions(tls_ca="/ca.pem").uses_tls


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"endpoints": ()}, "no endpoint"),
        ({"endpoints": ("a",)}, "'a' is neither"),
        ({"endpoints": ("a:1", "http://a:1")}, "twice"),
        ({"endpoints": ("http://a:1", "https://b:1")}, "mixed"),
        ({"endpoints": ("http://a:1",), "tls_ca": "/ca.pem"}, "http://a:1 says http://"),
        ({"namespace": "xferd"}, "must begin with /"),
        ({"namespace": "/"}, "must begin with /"),
        ({"namespace": "/a//b"}, "must begin with /"),
        ({"ttl": "1s"}, "out of range: 2s to 3600s"),
        ({"ttl": "6s", "request_timeout": "3s"}, r"at most a third of the ttl \(2s\)"),
        ({"dial_timeout": "4s"}, "at most request_timeout"),
        ({"tls_cert": "/cert.pem"}, "tls_cert and tls_key go together"),
        ({"user": "root"}, "user and password_file go together"),
        ({"endpoint": "a:1"}, "Extra inputs"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        EtcdOptions.model_validate(changes)
