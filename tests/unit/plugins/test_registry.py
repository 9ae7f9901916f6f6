"""Backends are found by name, imported only when configured, and their sections are checked."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from xferd.api.errors import ConfigError, Unsupported
from xferd.plugins.faulty import FaultyBackend
from xferd.plugins.local import LocalBackend
from xferd.plugins.posix import PosixBackend
from xferd.plugins.registry import BUILT_IN, create_backends, known_backends, load_backend

FOREIGN = """
from xferd.plugins.local import LocalBackend

class Ours(LocalBackend):
    name = "ours"

not_a_backend = 7
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install packages that offer backends, as pip would: modules and their entry points on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(package, points, source=FOREIGN):
        (tmp_path / f"{package}.py").write_text(source)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[xferd.backends]\n" + "".join(f"{line}\n" for line in points))

    yield install
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_every_built_in_name_is_its_class_name():
    for name in BUILT_IN:
        assert load_backend(name).name == name
    assert known_backends()[: len(BUILT_IN)] == tuple(BUILT_IN)


def test_creates_what_is_configured_with_its_options():
    backends = create_backends({"posix": {"movers": 3, "fsync": "data"}, "local": {}})
    assert list(backends) == ["posix", "local"]
    assert isinstance(backends["posix"], PosixBackend)
    assert isinstance(backends["local"], LocalBackend)
    assert backends["posix"].statistics().slots == 6


def test_nothing_configured_is_nothing_imported():
    script = (
        "import sys; from xferd.plugins.registry import create_backends; assert create_backends({}) == {};"
        "create_backends({'local': {}});"
        "print([m for m in sys.modules if m.startswith(('xferd.plugins.tcp', 'xferd.plugins.posix'))])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_name_lists_the_known_ones(install):
    install("xferd_ours", ["ours = xferd_ours:Ours"])
    with pytest.raises(ConfigError, match="no backend is called 'lokal'") as caught:
        create_backends({"lokal": {}})
    assert caught.value.limit == "one of local, posix, tcp, ucx, object, cuda, gds, faulty, ours"
    assert "[backends.lokal]" in caught.value.remedy


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"movers": 0}, r"backends\.local\.movers: .*greater than or equal to 1 \(given 0\)"),
        ({"moverz": 2}, r"backends\.local\.moverz: "),
        ({"movers": "many"}, r"backends\.local\.movers: "),
        ({"moverz": 2, "movers": -1}, r"backends\.local\.movers: .*backends\.local\.moverz: "),
    ],
)
def test_wrong_options_name_section_and_key(section, message):
    with pytest.raises(ConfigError, match=message) as caught:
        create_backends({"local": section})
    assert caught.value.remedy == "keys of [backends.local]: movers, nice"


def test_wrong_text_is_not_repeated():
    # A secret put under the wrong key must not be written to a log.
    with pytest.raises(ConfigError) as caught:
        create_backends({"posix": {"secret": "hunter2"}})
    assert "hunter2" not in str(caught.value)


def test_wrong_fault_names_its_place_in_the_list():
    with pytest.raises(ConfigError, match=r"backends\.faulty\.faults\.1\.probability: .*given 7"):
        create_backends(
            {"faulty": {"inner": "local", "faults": [{"kind": "error"}, {"kind": "error", "probability": 7}]}}
        )


def test_entry_point_is_a_backend_like_any_other(install):
    install("xferd_ours", ["ours = xferd_ours:Ours"])
    assert "ours" in known_backends()
    backend = create_backends({"ours": {"movers": 1}})["ours"]
    assert (backend.name, type(backend).__module__) == ("ours", "xferd_ours")


def test_built_in_name_cannot_be_taken(install):
    install("xferd_ours", ["local = xferd_ours:Ours"])
    assert {point.name for point in entry_points(group="xferd.backends")} == {"local"}
    assert load_backend("local") is LocalBackend
    assert known_backends().count("local") == 1


def test_name_offered_twice_names_both_packages(install):
    install("xferd_ours", ["ours = xferd_ours:Ours"])
    install("xferd_theirs", ["ours = xferd_theirs:Ours"])
    with pytest.raises(ConfigError, match=r"xferd[-_]ours and xferd[-_]theirs"):
        load_backend("ours")


@pytest.mark.parametrize("place", ["xferd_ours:not_a_backend", "xferd_ours:Missing"])
def test_what_is_no_backend_is_refused(install, place):
    install("xferd_ours", [f"ours = {place}"])
    with pytest.raises(ConfigError, match="is not a Backend") as caught:
        load_backend("ours")
    assert "xferd_ours" in caught.value.remedy


def test_missing_import_names_what_to_install(install):
    install("xferd_ours", ["ours = xferd_ours:Ours"], "import a_library_that_nobody_has\n")
    with pytest.raises(Unsupported, match="a_library_that_nobody_has") as caught:
        load_backend("ours")
    assert caught.value.remedy == "install what xferd_ours requires"


def test_missing_import_of_a_built_in_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "xferd.plugins.posix", None)  # what Python does for a module known to be missing
    with pytest.raises(Unsupported) as caught:
        load_backend("posix")
    assert caught.value.remedy == "pip install 'xferd[posix]'"


@pytest.mark.parametrize("sections", [["local", "faulty"], ["faulty", "local"]])
def test_decorator_shares_a_configured_inner_backend(sections):
    options = {"local": {}, "faulty": {"inner": "local"}}
    backends = create_backends({name: options[name] for name in sections})
    assert list(backends) == ["local", "faulty"]
    assert isinstance(backends["faulty"], FaultyBackend)
    assert backends["faulty"].inner is backends["local"]


def test_decorator_makes_an_inner_backend_that_is_not_configured():
    backend = create_backends({"faulty": {"inner": "posix"}})["faulty"]
    assert isinstance(backend, FaultyBackend)
    assert isinstance(backend.inner, PosixBackend)


@pytest.mark.parametrize(("inner", "message"), [("faulty", "wraps a backend itself"), ("nope", "no backend is called")])
def test_decorator_of_something_else_is_refused(inner, message):
    with pytest.raises(ConfigError, match=message):
        create_backends({"faulty": {"inner": inner}})


def test_default_directory_of_modules_matches_the_table():
    folder = Path(sys.modules["xferd.plugins.registry"].__file__).parent
    for name in BUILT_IN:
        assert (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists()
