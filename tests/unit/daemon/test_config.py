"""One tree from four sources; whatever is wrong is said with its key, its source and the nearest known key."""

import contextlib
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from xferd.api.errors import ConfigError
from xferd.daemon.config import ConfigSource, diff, keys, load_config, merge_live, to_toml
from xferd.daemon.config_checks import is_loopback, split_address
from xferd.daemon.config_toml import write_toml
from xferd.daemon.config_tree import default_run_dir
from xferd.plugins.object import StoreOptions
from xferd.plugins.registry import load_backend

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "systemd" / "xferd.toml"
TCP = ["backends.tcp.listen=127.0.0.1:7001", "backends.tcp.secret_file=/etc/xferd/cluster.secret"]


def load(*overrides, environ=None, file=None):
    return load_config(file, environ or {}, overrides)


def problem(*overrides, environ=None, file=None):
    with pytest.raises(ConfigError) as caught:
        load_config(file, environ or {}, overrides)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "xferd.toml"
        path.write_text(text)
        return path

    return write


# ------------------------------------------------------------------------------------------- sources


def test_later_sources_win(write):
    file = write('[log]\nlevel = "error"\nformat = "json"\n[transfers]\nchunk = "1MiB"\nmax_pieces = 5\n')
    environ = {"XFERD_LOG__LEVEL": "warning", "XFERD_TRANSFERS__CHUNK": "2MiB", "HOME": "/"}
    config = load("transfers.chunk=3MiB", environ=environ, file=file)
    assert (config.log.level, config.log.format) == ("warning", "json")
    assert (config.transfers.chunk, config.transfers.max_pieces) == (3 << 20, 5)
    assert config.transfers.staging == 64 << 20


def test_lists_and_tables_as_literals():
    config = load(
        'pools=[{name="a", nbytes="1GiB"}, {name="b", huge_pages=true}]',
        environ={
            "XFERD_FILES__ROOTS": '["/data", "/more"]',
            "XFERD_BACKENDS__TCP": '{"listen": "127.0.0.1:7001", "secret_file": "/s"}',
            "XFERD_SESSIONS__ALLOWED_UIDS": "[0, 1000]",
        },
    )
    assert [(p.name, p.nbytes, p.huge_pages) for p in config.pools] == [("a", 1 << 30, False), ("b", 256 << 20, True)]
    assert config.files.roots == ("/data", "/more")
    assert config.sessions.allowed_uids == (0, 1000)
    assert config.backends["tcp"] == {"listen": "127.0.0.1:7001", "secret_file": "/s"}


def test_text_that_looks_like_something_else_stays_text():
    assert load("node.name=1e3").node_name == "1e3"
    assert load("node.name=true").node_name == "true"
    assert load('node.name="quoted"').node_name == "quoted"


def test_backends_merge_and_can_be_taken_out(write):
    file = write("[backends]\nposix = false\n[backends.local]\nmovers = 3\n")
    assert load(file=file).backends == {"local": {"movers": 3}}
    assert load("backends.posix.movers=1", file=file).backends == {"local": {"movers": 3}, "posix": {"movers": 1}}


def test_tcp_is_active_once_it_has_work():
    assert list(load("backends.tcp.lanes=4").active_backends()) == ["local", "posix"]
    assert set(load(*TCP).active_backends()) == {"local", "posix", "tcp"}
    config = load('metadata.embedded.peers=[{name="b", address="tcp://127.0.0.1:1"}]', "backends.tcp.secret_file=/s")
    assert config.active_backends()["tcp"] == {"secret_file": "/s"}


def test_variables_of_the_client_are_not_ours():
    assert load(environ={"XFERD_SOCKET": "x", "XFERD": "y", "XFERD_": "z"}) == load()


def test_a_source_loads_again(write):
    file = write('[log]\nlevel = "error"\n')
    source = ConfigSource(file, {})
    assert source.load().log.level == "error"
    file.write_text('[log]\nlevel = "debug"\n')
    assert source.load().log.level == "debug"


# ------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("log.lvl=info", "log.lvl", "log.level"),
        ("transfer.chunk=1", "transfer", "transfers"),
        ("chunk=1MiB", "chunk", "transfers.chunk"),
        ("sessions.chunk=1MiB", "sessions.chunk", "transfers.chunk"),
        ('pools=[{nme="a"}]', "pools[0].nme", "pools.name"),
        ("metadata.embedded.peer=[]", "metadata.embedded.peer", "metadata.embedded.peers"),
    ],
)
def test_unknown_keys(override, key, nearest):
    message = problem(override)
    assert message.startswith(f"{key} (from --set ")
    assert f"did you mean {nearest}?" in message


def test_the_source_of_a_wrong_value_is_named(write):
    file = write('[log]\nlevel = "loud"\n')
    assert f"log.level (from {file})" in problem(file=file)
    assert "limits.max_group (from environment variable XFERD_LIMITS__MAX_GROUP)" in problem(
        environ={"XFERD_LIMITS__MAX_GROUP": "0"}
    )


def test_all_problems_at_once():
    message = problem("log.level=loud", "transfers.chunk=3Mb", "node.nam=x")
    assert message.startswith("3 problems:")
    assert all(key in message for key in ("log.level", "transfers.chunk", "node.nam"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["grpc.listen=0.0.0.0:1"], "grpc.token_file"),
        (["grpc.listen=:1"], "grpc.token_file"),
        (["grpc.listen=host.example:1"], "grpc.token_file"),
        (["rest.listen=[::]:1"], "rest.token_file"),
        (["rest.listen=9480"], "host:port"),
        (["rest.listen=127.0.0.1:65536"], "host:port"),
        (["grpc.tls_cert=/c"], "grpc.tls_key"),
        (["grpc.tls_client_ca=/c"], "grpc.tls_cert"),
        (TCP[:1], "backends.tcp.secret_file"),
        (['metadata.embedded.peers=[{name="b", address="tcp://h:1"}]'], "backends.tcp.secret_file"),
        ([*TCP, 'metadata.embedded.peers=[{name="b", address="udp://h:1"}]'], "tcp://host:port"),
        ([*TCP, 'metadata.embedded.peers=[{name="b", address="h"}]'], "tcp://host:port"),
        ([*TCP, "node.name=b", 'metadata.embedded.peers=[{name="b", address="tcp://h:1"}]'], "this node itself"),
        (["metadata.store=etcd", "backends.tcp={}"], "peers come from etcd"),
        (["metadata.store=etcd", 'metadata.embedded.peers=[{name="b", address="tcp://h:1"}]'], "finds peers by itself"),
        (["metadata.etcd.endpoints=[]"], "no endpoint"),
        (["metadata.etcd.request_timeout=5s"], "a third of the ttl"),
        (["metadata.etcd.namespace=xferd"], "must begin with /"),
        (['pools=[{name="a"}, {name="a"}]'], "2 pools have the name 'a'"),
        (["pools=[]"], "one pool at least"),
        (['pools=[{kind="VRAM"}]'], "add a section [backends.cuda]"),
        (["backends.cuda.devices=[0]", 'pools=[{kind="VRAM", device=1}]'], "GPU 1 is none of backends.cuda.devices"),
        (["backends.cuda={}", 'pools=[{kind="VRAM", nbytes="1TiB"}]'], "less than 1 TiB"),
        (["backends.cuda={}", 'pools=[{kind="VRAM", huge_pages=true}]'], "no pages of this machine"),
        (["backends.cuda={}", 'pools=[{kind="VRAM", collapse="off"}]'], "no pages of this machine"),
        (["pools=[{device=1}]"], "set kind = 'VRAM'"),
        (['storage_pools=[{name="host", directories=[{path="/a"}], nbytes=4096}]'], "2 pools have the name 'host'"),
        (['storage_pools=[{name="s", directories=[], nbytes=4096}]'], "name a directory at least"),
        (['storage_pools=[{name="s", directories=[{path="a"}], nbytes=4096}]'], "is not absolute"),
        (['storage_pools=[{name="s", directories=[{path="/a"}, {path="/a/"}], nbytes=8192}]'], "named 2 times"),
        (['storage_pools=[{name="s", directories=[{path="/a"}, {path="/b"}], nbytes=4096}]'], "gets 2048 bytes"),
        (['storage_pools=[{name="s", directories=[{path="/a"}], nbytes=4096, block_nbytes=5000}]'], "multiple of 4096"),
        (
            ['storage_pools=[{name="s", directories=[{path="/a"}], nbytes=4096, checksum="off", verify=true}]'],
            "nothing to compare",
        ),
        (["transfers.chunk=128MiB"], "transfers.staging"),
        (["limits.max_notification=32MiB"], "limits.max_inbox"),
        (["limits.max_notification=64MiB", "limits.max_inbox=64MiB"], "grpc.max_message"),
        ([f"node.run_dir=/{'x' * 120}"], "shorter node.run_dir"),
        (["grpc.socket=/run/a", "rest.socket=/run/a"], "also the path of grpc.socket"),
        (["files.roots=['data']"], "not absolute"),
        (["node=3"], "must be a table"),
        (["backends.tcp=3"], "must be a table"),
        (["pools=3"], "must be a list"),
        (["pools.host.nbytes=1"], "must be a list"),
        (["log.level.x=1"], "log.level"),
        (["node.name=a b"], "node.name"),
        (["limits.max_group=true"], "limits.max_group"),
        (["nothing"], "section.key=value"),
        (["=1"], "section.key=value"),
    ],
)
def test_refused(overrides, expected):
    assert expected in problem(*overrides)


def test_loopback_or_locked_listeners_are_fine():
    config = load("grpc.listen=0.0.0.0:1", "grpc.token_file=/t", "rest.listen=[::1]:9480")
    assert config.rest.listen == "[::1]:9480"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"[log\n", "line 1"),
        (b"log.level = info\n", "quotes"),
        (b"\xff\xfe", "UTF-8"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b"#" * (1 << 20) + b"\n", "too large"),
    ],
)
def test_broken_files(tmp_path, raw, expected):
    file = tmp_path / "broken.toml"
    file.write_bytes(raw)
    message = problem(file=file)
    assert str(file) in message
    assert expected in message


def test_a_missing_file(tmp_path):
    assert "No such file" in problem(file=tmp_path / "none.toml")
    assert "Is a directory" in problem(file=tmp_path)


def test_a_variable_that_is_no_text():
    assert "not UTF-8" in problem(environ={"XFERD_NODE__NAME": "\udc80"})


def test_the_tree_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load().log.level = "debug"


@given(st.text(max_size=30), st.text(alphabet="XFERD_LOGPOSNTIVE", max_size=20), st.text(max_size=20))
def test_any_flag_or_variable_is_taken_or_refused(flag, variable, value):
    for environ, overrides in (({f"XFERD_{variable}": value}, ()), ({}, (flag,)), ({}, (f"log.level={value}",))):
        with contextlib.suppress(ConfigError):
            assert load_config(None, environ, overrides).pools


# ------------------------------------------------------------------------------------------- resolved defaults


def test_where_things_are():
    config = load("node.run_dir=/run/x", "rest.socket=/elsewhere/a.sock")
    assert config.session_socket == Path("/run/x/session.sock")
    assert config.grpc_socket == Path("/run/x/grpc.sock")
    assert config.rest_socket == Path("/elsewhere/a.sock")
    assert load().node.name == load().node_name != ""


def test_the_run_directory():
    assert default_run_dir({"RUNTIME_DIRECTORY": "/run/a:/run/b", "XDG_RUNTIME_DIR": "/u"}, 5) == Path("/run/a")
    assert default_run_dir({"XDG_RUNTIME_DIR": "/u"}, 0) == Path("/run/xferd")
    assert default_run_dir({"XDG_RUNTIME_DIR": "/u"}, 5) == Path("/u/xferd")
    assert default_run_dir({}, 5) == Path("/tmp/xferd-5")
    assert load(environ={"RUNTIME_DIRECTORY": "/run/a"}).run_dir == Path("/run/a")


@pytest.mark.parametrize(
    ("text", "address"), [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:0", ("::1", 0)), (":65535", ("", 65535))]
)
def test_addresses(text, address):
    assert split_address(text) == address


@pytest.mark.parametrize("text", ["", "80", "a:", "a:b", "::1:80", "a:-1", "a:\u0661", "a b:1", "a:65536"])
def test_no_addresses(text):
    with pytest.raises(ConfigError):
        split_address(text)


def test_loopback():
    assert [is_loopback(host) for host in ("127.0.0.9", "::1", "localhost", "", "0.0.0.0", "10.0.0.1", "h")] == [
        True,
        True,
        True,
        False,
        False,
        False,
        False,
    ]


# ------------------------------------------------------------------------------------------- printing


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["backends.posix=false", "node.name=a.b"],
        [*TCP, 'metadata.embedded.peers=[{name="b", address="tcp://h:1"}]', 'files.roots=["/a \\"b\\"", "/ü"]'],
        ['pools=[{name="a"},{name="b",nbytes=8192}]', "sessions.allowed_uids=[1,2]", "transfers.default_timeout=0.1"],
        ['backends.faulty={inner="local", faults=[{kind="delay", delay="1ms"}]}', "backends.other={a={b=[]}, c=1.5}"],
    ],
)
def test_printed_configuration_loads_back(overrides, write):
    config = load(*overrides)
    assert load(file=write(to_toml(config))) == config


def test_secrets_are_not_printed():
    config = load('backends.object={secret_key="hunter2", token_file="/t", inner=[{password="hunter3"}]}')
    text = to_toml(config)
    assert "hunter" not in text
    assert "/t" in text
    assert "hunter2" in to_toml(config, redact=False)


scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats(allow_nan=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    scalars | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=20,
)


def _without_none(value):
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _has_none_in_list(value):
    if isinstance(value, list):
        return any(item is None or _has_none_in_list(item) for item in value)
    return isinstance(value, dict) and any(map(_has_none_in_list, value.values()))


@given(st.dictionaries(texts, values, max_size=5).filter(lambda tree: not _has_none_in_list(tree)))
def test_any_tree_reads_back(tree):
    assert tomllib.loads(write_toml(tree)) == _without_none(tree)


# ------------------------------------------------------------------------------------------- reload


def test_changes_are_sorted_into_live_and_not():
    old = load()
    new = load(
        "log.level=debug", "files.roots=['/a']", "transfers.chunk=1MiB", "backends.local.movers=4", "node.name=z"
    )
    changes = diff(old, new)
    assert changes.live == ("log.level", "files.roots")
    assert changes.fixed == ("node.name", "transfers.chunk", "backends.local")
    merged = merge_live(old, new)
    assert diff(old, merged).live == changes.live
    assert diff(old, merged).fixed == ()
    assert diff(merged, new).fixed == changes.fixed
    assert diff(new, new).live == diff(new, new).fixed == ()


def test_live_keys_that_contradict_those_that_wait():
    new = load("grpc.max_message=1GiB", "limits.max_notification=64MiB", "limits.max_inbox=64MiB")
    with pytest.raises(ConfigError, match="wait for a restart"):
        merge_live(load(), new)


# ------------------------------------------------------------------------------------------- shipped file and docs


def _uncommented():
    """Return the shipped file with every commented key and section put in force."""
    return re.sub(r"(?m)^#(?=[a-z_]+ = |\[)", "", SHIPPED.read_text())


def test_the_shipped_file_changes_nothing():
    assert load(file=SHIPPED) == load()


def test_the_shipped_file_shows_the_defaults(write):
    tree = tomllib.loads(_uncommented())
    backends = tree.pop("backends")
    config = load(file=write(write_toml(tree)))
    assert config == load()
    for name, section in backends.items():
        options = load_backend(name).options
        assert options.model_validate(section) == options()
        assert set(section) == set(options.model_fields)


def test_the_shipped_file_has_every_key():
    tree = tomllib.loads(_uncommented())
    for key in keys():
        if key.path.startswith("metadata.embedded.peers[]"):
            continue  # in the comment of peers, because a list of peers has no default entry
        if key.path.startswith("storage_pools[]"):
            continue  # likewise
        at = tree
        for part in key.path.replace("[]", ".0").split("."):
            at = at[int(part)] if part.isdigit() else at[part]


def _documented():
    text = (ROOT / "docs" / "configuration.md").read_text()
    rows = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in re.findall(r"(?m)^\| `.*$", text)]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_documentation_has_every_key_with_its_default():
    documented = _documented()
    expected = {key.path: key for key in keys()}
    for option in StoreOptions.model_fields:
        assert f"backends.object.stores.NAME.{option}" in documented
    for name in ("local", "posix", "tcp", "ucx", "object", "cuda", "gds", "faulty"):
        for option in load_backend(name).options.model_fields:
            assert f"backends.{name}.{option}" in documented
    assert set(expected) == {path for path in documented if not path.startswith("backends.")}
    for path, key in expected.items():
        kind, default, live, meaning = documented[path]
        assert live == ("yes" if key.is_live else "no"), path
        assert kind, path
        assert meaning, path
        if path == "pools":
            assert default == "one pool"
        elif path == "storage_pools":
            assert default == "`[]`"
        elif key.field.default is PydanticUndefined:
            assert default == "required", path
        else:
            section, _, name = path.rpartition(".")
            model = load('storage_pools=[{name="ssd", directories=[{path="/ssd"}], nbytes=4096}]')
            for part in section.replace("[]", "").split("."):
                model = getattr(model, part)
                model = model[0] if isinstance(model, tuple) else model
            shown = tomllib.loads(f"v = {default.strip('`')}")["v"]
            built = type(model).model_validate(model.model_dump() | {name: shown})
            assert getattr(built, name) == type(model).model_fields[name].default, path
