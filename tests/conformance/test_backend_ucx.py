"""The ``ucx`` backend passes the suite of all backends, over TCP and over shared memory."""

from __future__ import annotations

import pytest
from check_backend import CHECKS
from ucx_rig import ucx_maker

from xferd.api.errors import Unsupported
from xferd.plugins.ucx.library import load

try:
    load("")
except Unsupported as exc:
    pytest.skip(str(exc), allow_module_level=True)

MAKERS = {
    "tcp": ucx_maker(transports="tcp,self"),
    "shared-memory": ucx_maker(transports="posix,sysv,cma,self"),
    "found": ucx_maker(spin_us=200, slots=2, servers=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", MAKERS)
def test_ucx_conforms(name, check):
    check(MAKERS[name])
