"""The parser of both commands, and the variables that they know."""

import argparse
import sys
from types import SimpleNamespace

import pytest

from bridge_wire import commands
from bridge_wire.commands import (
    VARIABLES,
    Help,
    Parser,
    add_completion,
    unknown_variables,
)


def parser() -> Parser:
    made = Parser("tool")
    inner = made.add_subparsers(dest="command", required=True)
    one = inner.add_parser("describe")
    one.add_argument("--json", action="store_true")
    one.add_argument("--level", choices=("info", "debug"))
    return made


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["descrbe"], "'descrbe' is not one of describe; did you mean 'describe'?"),
        (["describe", "--jsn"], "arguments: --jsn; did you mean '--json'?"),
        (["describe", "--zzzz"], "arguments: --zzzz (see"),
        (["describe", "--level", "inf"], "did you mean 'info'?"),
    ],
)
def test_error_is_one_sentence_with_near_matches(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt word or flag is told in one line, and the status is 2."""
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(words)
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert said in text
    assert text.count("\n") == 1


def test_help_shows_defaults_that_can_be_written() -> None:
    """Numbers and texts are shown; lists, None, switches and empty texts are not."""
    shown = argparse.ArgumentParser("tool", formatter_class=Help)
    defaults: list[object] = [7, 0.5, "info", None, [], {}, False, ""]
    for number, default in enumerate(defaults):
        shown.add_argument(f"--flag{number}", default=default, help="words")
    shown.add_argument("--told", default=3, help="words; default: three")
    text = shown.format_help()
    assert text.count("(default: ") == 3
    for part in ("(default: 7)", "(default: 0.5)", "(default: info)"):
        assert part in text


def test_completion_needs_its_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without shtab the flag says how to install it, and with it a script is printed."""
    made = parser()
    add_completion(made)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "shtab", None)
        with pytest.raises(SystemExit) as ended:
            made.parse_args(["--print-completion", "bash"])
    assert ended.value.code == 2
    assert 'pip install "torch-jax-bridge[cli]"' in capsys.readouterr().err
    given = SimpleNamespace(FILE={}, complete=lambda of, shell: f"{of.prog} in {shell}")
    monkeypatch.setitem(sys.modules, "shtab", given)
    with pytest.raises(SystemExit) as ended:
        made.parse_args(["--print-completion", "zsh"])
    assert not ended.value.code
    assert capsys.readouterr().out == "tool in zsh\n"


def test_unknown_variables_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known variables, and those of others, are passed over; a near one is proposed."""
    for name in [*commands.os.environ]:
        if name.startswith("BRIDGE_"):
            monkeypatch.delenv(name)
    for name in (*VARIABLES, "BRIDGE_SERVICE_HOST", "BRIDGE_PORT_50051_TCP", "OTHER"):
        monkeypatch.setenv(name, "1")
    assert list(unknown_variables()) == []
    monkeypatch.setenv("BRIDGE_TOKN", "1")
    monkeypatch.setenv("BRIDGE_UNLIKE_ALL_OTHERS", "1")
    near, far = unknown_variables()
    assert near.endswith(
        "BRIDGE_TOKN is unknown and ignored; did you mean 'BRIDGE_TOKEN'?"
    )
    assert far.endswith("BRIDGE_UNLIKE_ALL_OTHERS is unknown and ignored")
