"""The command prints and checks configurations, and says what is wrong in words and in its exit status."""

import tomllib

import pytest

from xferd.daemon.cli import main, version
from xferd.daemon.config import load_config


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"xferd {version()}\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["--print-config", "--set", "log.level=debug"],
        ["serve", "--set", "log.level=debug", "--print-config"],
        ["--set", "log.level=debug", "serve", "--print-config"],
    ],
)
def test_print_config(argv, capsys, tmp_path):
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert tomllib.loads(out)["log"]["level"] == "debug"
    file = tmp_path / "printed.toml"
    file.write_text(out)
    assert load_config(file, {}).log.level == "debug"


def test_flags_add_up(capsys):
    assert main(["--set", "log.level=debug", "serve", "--set", "transfers.chunk=4KiB", "--print-config"]) == 0
    tree = tomllib.loads(capsys.readouterr().out)
    assert (tree["log"]["level"], tree["transfers"]["chunk"]) == ("debug", "4KiB")


def test_validate_config(capsys, monkeypatch):
    monkeypatch.setenv("XFERD_NODE__NAME", "here")
    assert main(["serve", "--validate-config"]) == 0
    assert "here is valid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--validate-config", "--set", "log.lvl=x"], "did you mean log.level?"),
        (["serve", "--set", "log.lvl=x"], "did you mean log.level?"),
        (["--print-config", "--set", "backends.local.mover=3"], "backends.local.mover"),
        (["--validate-config", "--set", "backends.nosuch.x=3"], "no backend is called 'nosuch'"),
        (["--validate-config", "--config", "/nonexistent/xferd.toml"], "/nonexistent/xferd.toml"),
    ],
)
def test_wrong_configuration(argv, words, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("xferd: ")
    assert words in err
    assert "Traceback" not in err


def test_nothing_to_do_prints_help(capsys):
    assert main([]) == 2
    assert "usage: xferd" in capsys.readouterr().err


def test_unknown_command():
    with pytest.raises(SystemExit) as caught:
        main(["server"])
    assert caught.value.code == 2
