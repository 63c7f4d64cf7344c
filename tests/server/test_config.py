"""The file of --config: its place below flags and variables, and its errors."""

from pathlib import Path

import pytest

from bridge_server.process.options import parse, show
from tests.conftest import ROOT
from tests.workers import environment, serving

FILE = """
[worker]
jax-model = ["tests.models:square", "total=tests.models:total"]
listen = "unix:/run/b.sock"
x64 = true
no-jit = false
max-runs = 3
residual-bytes = "512M"
drain_s = 2.5
mesh = "data=2"
factory = { depth = 3, of = { urdf = "arm.urdf" } }
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in list(environment()):
        assert not name.startswith("BRIDGE_")
    for name in ("X64", "MAX_RUNS", "CONFIG", "FACTORY", "LISTEN", "TORCH_MODEL"):
        monkeypatch.delenv(f"BRIDGE_{name}", raising=False)
    path = tmp_path / "bridge.toml"
    path.write_text(FILE)
    return str(path)


def test_file_gives_options_of_each_type(file: str) -> None:
    """Texts, numbers, switches, lists and the arguments of factories are read like flags."""
    options = parse(["--config", file])
    assert options.jax_model == ["tests.models:square", "total=tests.models:total"]
    assert options.listen == "unix:/run/b.sock"
    assert (options.x64, options.no_jit, options.max_runs) == (True, False, 3)
    assert (options.residual_bytes, options.drain_s) == (512 << 20, 2.5)
    assert options.mesh == {"data": 2}
    assert options.factory == {"depth": 3, "of": {"urdf": "arm.urdf"}}


def test_flags_come_before_variables_before_the_file(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each option is that of the highest place; a variable can switch off what the file has on."""
    monkeypatch.setenv("BRIDGE_CONFIG", file)
    monkeypatch.setenv("BRIDGE_X64", "0")
    monkeypatch.setenv("BRIDGE_MAX_RUNS", "4")
    options = parse([])
    assert (options.x64, options.max_runs, options.drain_s) == (False, 4, 2.5)
    assert parse(["--max-runs", "5", "--x64"]).max_runs == 5
    assert parse(["--x64"]).x64


@pytest.mark.parametrize(
    ("argv", "variables"),
    [
        (["model.py:f"], {}),
        (["--torch-model", "model:f"], {}),
        ([], {"BRIDGE_TORCH_MODEL": "model:f"}),
    ],
)
def test_models_and_addresses_hide_other_forms(
    file: str,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    variables: dict[str, str],
) -> None:
    """Models of a higher place hide those of the file, whatever the flag; so does --port."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = parse(["--config", file, "--port", "0", *argv])
    assert not options.jax_model
    assert (options.port, options.listen) == ("0", None)


def test_config_show_prints_a_file_with_origins(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output names where each option is from, and is a file of the same options."""
    monkeypatch.setenv("BRIDGE_MAX_RUNS", "4")
    argv = ["--config", file, "--drain-s=1"]
    assert show(["show", *argv]) == 0
    text = capsys.readouterr().out
    assert "max-runs = 4  # variable BRIDGE_MAX_RUNS\n" in text
    assert "drain-s = 1.0  # flag\n" in text
    assert f'mesh = "data=2"  # file {file}\n' in text
    again = Path(file).with_name("again.toml")
    again.write_text(text)
    first, second = (vars(parse(["--config", path])) for path in (file, str(again)))
    differ = {name for name in first if first[name] != second[name]}
    assert differ == {"config", "drain_s"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[worker]\nmax-rums = 3",
            "unknown option 'max_rums'; did you mean 'max-runs'",
        ),
        ("[worker]\nx64 = 'yes'", "x64 is 'yes'; expected true or false"),
        (
            "[worker]\nmax-runs = 3\nmax_runs = 4",
            "has both 'max-runs' and 'max_runs', which are one option",
        ),
        ("[worker]\nmax-runs = true", "max-runs is True; expected a text or a number"),
        ("[worker]\nmax-runs = 'lots'", "max_runs: 'lots' is not a count"),
        ("[worker]\nconfig = 'x'", "unknown option 'config'"),
        ("[workers]\n", "has 'workers'; expected one table [worker]"),
        ("", "has no table 'worker'"),
        ("[worker", "is no TOML"),
    ],
)
def test_wrong_file_is_told(
    file: str, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each mistake in the file is one sentence with the file's name, and status 2."""
    Path(file).write_text(text)
    with pytest.raises(SystemExit) as ended:
        parse(["--config", file])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert said in told and file in told
    assert told.count("\n") == 1


def test_missing_file_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A --config that is not there is an error."""
    with pytest.raises(SystemExit):
        parse(["--config", "/no/such.toml"])
    assert "cannot read --config /no/such.toml" in capsys.readouterr().err


def test_worker_starts_from_a_file(tmp_path: Path) -> None:
    """A worker needs no other argument than its file."""
    path = tmp_path / "bridge.toml"
    path.write_text(
        f'[worker]\ntargets = ["{ROOT}/tests/models.py:square"]\nlisten = "unix:{tmp_path}/w"\n'
    )
    with serving(tmp_path, env={"BRIDGE_CONFIG": str(path)}) as worker:
        assert worker.address == f"unix:{tmp_path}/w"
        assert worker.ready_line["models"] == "square"
