"""The house stands as it is drawn: imports point down only, packages are declared, modules stay readable."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = ("api", "clients", "daemon", "metadata", "plugins")
MAX_LINES = 650

# What a package may import of the others. Types count: an arrow is an arrow, also under TYPE_CHECKING.
MAY_IMPORT = {
    "api": set(),
    "metadata": {"api"},
    "plugins": {"api"},
    "clients": {"api"},
    "daemon": {"api", "metadata", "plugins"},
}
# The two faces speak to the Engine protocol; only the composition root knows them.
FACES = ("xferd.api.grpc", "xferd.api.rest")
# What an inference engine installs with the client library, and so all that its imports may need.
LIGHT = {"grpc", "google", "numpy"}
# Parts of clients/ that have an extra of their own, or are run only where their libraries are.
HEAVY_CLIENTS = ("clients/bench", "clients/ctl", "clients/demo")


def modules() -> list[Path]:
    return sorted(path for top in TOP for path in (ROOT / top).rglob("*.py"))


def is_generated(path: Path) -> bool:
    return "_pb2" in path.name


def imports(path: Path, source: str | None = None) -> set[str]:
    """Return the full names that a module imports; ``from a import b`` gives ``a`` and ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def is_face(name: str) -> bool:
    return any(name == face or name.startswith(f"{face}.") for face in FACES)


def forbidden(place: str, names: set[str]) -> set[str]:
    """Return those of the imported names that a module at ``place`` (relative path) may not import."""
    package = place.split("/")[0]
    bad = set()
    for name in names:
        parts = name.split(".")
        if parts[0] in TOP:
            bad.add(name)  # the folder, where xferd.<folder> is meant
        if parts[0] != "xferd" or len(parts) < 2:
            continue
        if parts[1] != package and parts[1] not in MAY_IMPORT[package]:
            bad.add(name)
        if is_face(name) and package != "daemon" and not place.startswith(("api/grpc/", "api/rest/")):
            bad.add(name)
        # A face does not know the other face.
        if place.startswith("api/grpc/") and name.startswith("xferd.api.rest"):
            bad.add(name)
        if place.startswith("api/rest/") and name.startswith("xferd.api.grpc"):
            bad.add(name)
    return bad


def place_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("top", TOP)
def test_arrows_point_down(top):
    wrong = {place_of(path): forbidden(place_of(path), imports(path)) for path in (ROOT / top).rglob("*.py")}
    assert {place: names for place, names in wrong.items() if names} == {}


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("api/types.py", "import xferd.daemon"),
        ("api/types.py", "from xferd.api.grpc import server"),
        ("api/grpc/server.py", "from xferd.api.rest import app"),
        ("plugins/local.py", "from xferd.metadata.base import Store"),
        ("metadata/base.py", "from xferd import plugins"),
        ("plugins/local.py", "if TYPE_CHECKING:\n    from xferd.daemon.config import Config"),
        ("plugins/local.py", "def late():\n    import xferd.daemon.app"),
        ("clients/client.py", "from xferd.api import rest"),
        ("clients/client.py", "import xferd.plugins.vectored"),
        ("daemon/app.py", "import xferd.clients"),
        ("daemon/app.py", "import plugins"),
    ],
)
def test_arrow_up_would_be_noticed(place, source):
    assert forbidden(place, imports(Path(place), source))


def test_client_library_needs_only_what_it_declares():
    """Clients, and the leaf modules of api/ that they share, import nothing heavy when they are imported."""
    wrong = {}
    for path in modules():
        place = place_of(path)
        if not place.startswith(("api/", "clients/")) or place.startswith(("api/grpc/", "api/rest/", *HEAVY_CLIENTS)):
            continue
        if place == "api/proto/generate.py":  # run by developers
            continue
        tops = {name.split(".")[0] for name in imports(path)}
        heavy = tops - LIGHT - {"xferd"} - sys.stdlib_module_names
        if heavy:
            wrong[place] = heavy
    assert wrong == {}


def test_every_package_is_declared():
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {f"xferd.{place_of(path.parent).replace('/', '.')}" for path in modules()}
    assert declared == found
    for name in found:
        folder = ROOT.joinpath(*name.split(".")[1:])
        assert (folder / "__init__.py").exists(), f"{folder} has no __init__.py"


def test_every_top_package_is_typed_and_xferd_is_a_namespace():
    assert [top for top in TOP if not (ROOT / top / "py.typed").exists()] == []
    assert not (ROOT / "__init__.py").exists()


def test_modules_stay_readable():
    lengths = {place_of(path): len(path.read_text().splitlines()) for path in modules() if not is_generated(path)}
    assert {place: lines for place, lines in lengths.items() if lines > MAX_LINES} == {}


def test_every_module_says_what_it_is_for():
    silent = [
        place_of(path)
        for path in modules()
        if not is_generated(path) and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert silent == []
