"""The example of ``docs/backends.md`` runs as it is printed, and is a backend like any other."""

from __future__ import annotations

import re
import tomllib
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from arenas import MappedArena
from check_backend import CHECKS, Rig

from xferd.plugins.base import Backend
from xferd.plugins.faulty import FaultyOptions
from xferd.plugins.registry import parse_options

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "backends.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def plain():
    namespace = {"__name__": "plain"}
    exec(compile(blocks("python")[0], str(GUIDE), "exec"), namespace)
    return namespace["PlainBackend"]


class PlainRig(Rig):
    def __init__(self, backend):
        self.backend = backend

    def arena(self, kind, nbytes):
        return MappedArena(nbytes)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_example_conforms(plain, check):
    @asynccontextmanager
    async def maker():
        yield PlainRig(plain(parse_options("plain", plain, {"threads": 2})))

    check(maker)


def test_example_is_complete(plain):
    assert issubclass(plain, Backend)
    assert plain.name == "plain"


def test_example_of_a_drill_is_valid():
    section = tomllib.loads(blocks("toml")[1])["backends"]["faulty"]
    options = FaultyOptions.model_validate(section)
    assert options.faults[0].after_nbytes == 64 << 20
