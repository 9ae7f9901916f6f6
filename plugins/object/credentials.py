"""Where credentials come from. Nothing here keeps, logs or shows one; obstore alone sees them.

The chain: a file or profile that the store's section names; for S3 the environment; the shared credentials file of
the AWS tools; and then obstore's own (web identity, container, instance metadata). Files are read again as long as
the daemon runs, so that credentials that are renewed in place are taken up.
"""

from __future__ import annotations

import configparser
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from xferd.api.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from xferd.plugins.object.options import StoreOptions

REREAD_S = 60.0
"""How long credentials from a file are used before the file is read again."""

_KEYS = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key"}
_AZURE_KEYS = frozenset({"account_key", "sas_token", "client_id", "client_secret", "tenant_id"})
_FROM_ENVIRONMENT = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")


class Credential(TypedDict):
    """What obstore asks of a provider for S3."""

    access_key_id: str
    secret_access_key: str
    token: str | None
    expires_at: datetime | None


def s3_provider(options: StoreOptions, environ: Mapping[str, str]) -> Callable[[], Credential] | None:
    """Return what obstore asks for credentials, or None where it has to find them by itself.

    Raises:
        ConfigError: a file or profile that is named cannot be read, or lacks a key.
    """
    path, profile = options.credentials_file, options.profile or "default"
    if not path:
        home = environ.get("AWS_SHARED_CREDENTIALS_FILE", "") or str(Path("~/.aws/credentials").expanduser())
        named = options.profile or environ.get("AWS_PROFILE", "")
        is_elsewhere = any(environ.get(name) for name in _FROM_ENVIRONMENT)
        if not named and (is_elsewhere or not _has_profile(home, "default")):
            return None
        path, profile = home, named or "default"

    def provide() -> Credential:
        section = _read(path, profile)
        return Credential(
            access_key_id=section["aws_access_key_id"],
            secret_access_key=section["aws_secret_access_key"],
            token=section.get("aws_session_token") or None,
            expires_at=datetime.now(UTC) + timedelta(seconds=REREAD_S),
        )

    provide()  # what is wrong with the file is to be known at the start
    return provide


def azure_config(options: StoreOptions) -> dict[str, str]:
    """Return what the named file says, as obstore's configuration; nothing where none is named.

    Raises:
        ConfigError: the file cannot be read, or has none of the keys.
    """
    if not options.credentials_file:
        return {}
    found = {key: value for key, value in _section(options.credentials_file, "default").items() if key in _AZURE_KEYS}
    if not found:
        raise ConfigError(
            f"credentials file {options.credentials_file} has no key that is known",
            limit=", ".join(sorted(_AZURE_KEYS)),
            remedy="write them below [default]",
        )
    return found


def environ_of_process() -> Mapping[str, str]:
    """Return the daemon's environment; a function, so that tests can do without it."""
    return os.environ


def _has_profile(path: str, profile: str) -> bool:
    parser = configparser.RawConfigParser()
    try:
        return bool(parser.read(path, encoding="utf-8")) and parser.has_section(profile)
    except (configparser.Error, OSError, UnicodeDecodeError):
        return False


def _read(path: str, profile: str) -> Mapping[str, str]:
    section = _section(path, profile)
    for key in _KEYS:
        if not section.get(key):
            raise ConfigError(f"profile {profile!r} of credentials file {path} has no {key}", remedy="add it")
    return section


def _section(path: str, profile: str) -> Mapping[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"credentials file {path}: {error.strerror}", remedy="make it readable for the daemon"
        ) from error
    except (configparser.Error, UnicodeDecodeError):
        # Not chained: a parser's error quotes the line, which may hold the secret.
        raise ConfigError(
            f"credentials file {path} is no file of [profile] sections with key = value lines", remedy="correct it"
        ) from None
    if not parser.has_section(profile):
        raise ConfigError(f"credentials file {path} has no profile {profile!r}", remedy="name one that it has")
    return dict(parser.items(profile))
