"""Help and shell completion of both commands."""

import os
import pty
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest

from bridge_client import cli
from bridge_server import cli as server
from tests.conftest import ROOT

Main = Callable[[Sequence[str]], int]
MAINS = {"bridge_client": cli.main, "bridge_server": server.main}
COMMANDS = [*cli._EXAMPLES]
# Prints the words that bash proposes after a line.
_PROPOSE = """
eval "$(cat)"
COMP_WORDS=({line}); COMP_CWORD=$(({count} - 1))
COMPREPLY=()
{function}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def output(capsys: pytest.CaptureFixture[str], main: Main, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code
    printed = capsys.readouterr()
    assert not printed.err
    return printed.out


def test_clients_commands_are_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    """The help lists every command once, under a title, then the options and examples."""
    text = output(capsys, cli.main, "--help")
    titles = ["workers", "models", "programs", "options", "examples"]
    places = [text.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places)
    for command in COMMANDS:
        assert text.count(f"\n  {command} ") == 1
    assert text.startswith("usage: bridge_client COMMAND [options]\n")
    assert text.endswith("docs/operations.md describes them.\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_a_command_can_be_parsed(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command's help has examples, which the parser takes."""
    text = output(capsys, cli.main, command, "--help")
    examples = text.split("\nexamples:\n")[1].splitlines()
    assert examples
    for line in examples:
        program, *words = shlex.split(line)
        assert program == "bridge_client"
        assert cli._parser().parse_args(words).command == command


def test_examples_of_the_client_can_be_parsed() -> None:
    """The client's own help has examples that its parser takes."""
    lines = [line for line in cli._EPILOG.splitlines() if line.startswith("  ")]
    assert len(lines) == 3
    for line in lines:
        assert cli._parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("name", MAINS)
def test_help_that_is_no_terminals_is_plain(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output to a file or a pipe has no colours, whatever is installed."""
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b" not in output(capsys, MAINS[name], "--help")


def on_terminal(name: str, **variables: str) -> str:
    """Return the help of a command on a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", name, "--help"],
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "80"} | variables,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
    ) as process:
        os.close(theirs)
        text = b""
        try:
            while chunk := os.read(ours, 1 << 16):
                text += chunk
        except OSError:  # Linux reports the end of a terminal so
            pass
        os.close(ours)
        assert process.wait(60) == 0
    return text.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("name", MAINS)
@pytest.mark.parametrize("variable", ["NO_COLOR=1", "TERM=dumb"])
def test_terminal_without_colours_has_plain_help(name: str, variable: str) -> None:
    """NO_COLOR and a dumb terminal turn the colours off."""
    key, value = variable.split("=")
    text = on_terminal(name, **{key: value})
    assert "\x1b" not in text
    assert "\nmodels:\n" in text and "\nexamples:\n" in text


@pytest.mark.parametrize("name", MAINS)
def test_terminal_has_coloured_help(name: str) -> None:
    """With rich-argparse, the help has colours, and the very words of the plain help."""
    pytest.importorskip("rich_argparse", reason="the extra cli is not installed")
    text = on_terminal(name)
    assert "\x1b[" in text
    plain = pytest.importorskip("rich.text").Text.from_ansi(text).plain
    assert plain.split() == on_terminal(name, NO_COLOR="1").split()


def proposed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Return the completions of bash for a line whose last word is unfinished."""
    script = output(capsys, MAINS[words[0]], "--print-completion", "bash")
    program = _PROPOSE.format(
        line=" ".join(map(shlex.quote, words)),
        count=len(words),
        function=f"_shtab_{words[0]}",
    )
    done = subprocess.run(
        ["bash", "-c", program], input=script, capture_output=True, text=True, cwd=ROOT
    )
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["bridge_client", "he"], ["health"]),
        (["bridge_client", "describe", "--js"], ["--json"]),
        (["bridge_client", "stubs", "--client", "n"], ["numpy"]),
        (["bridge_client", "health", "--tls-ca", "CHAN"], ["CHANGELOG.md"]),
        (["bridge_server", "--resid"], ["--residual-bytes"]),
        (["bridge_server", "--log-level", "in"], ["info"]),
        (["bridge_server", "--config", "pypro"], ["pyproject.toml"]),
        (["bridge_server", "CONTRIB"], ["CONTRIBUTING.md"]),
    ],
)
def test_bash_completes_commands_flags_choices_and_files(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed script completes what stands before the cursor."""
    assert proposed(capsys, *words) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
@pytest.mark.parametrize("name", MAINS)
def test_completion_is_printed_for_each_shell(
    name: str, shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each shell has a script, which names the flags."""
    assert "token-file" in output(capsys, MAINS[name], "--print-completion", shell)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["descrbe"], "did you mean 'describe'?"),
        (["stub"], "did you mean 'stubs'?"),
        (["health", "--tiemout=1"], "did you mean '--timeout'?"),
        (["stubs", "--client", "tensorflow"], "is not one of torch, jax, numpy"),
    ],
)
def test_misspelt_word_of_the_client_is_told(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt command, flag or choice is one sentence, with status 2."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert said in text
    assert text.count("\n") == 1
