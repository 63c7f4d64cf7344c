"""Parsing shared by both commands: help, errors of one sentence with near matches, variables."""

import argparse
import difflib
import math
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

DOCS = "docs/operations.md"
_UNRECOGNIZED = "unrecognized arguments: "
# All variables of the worker, the client and the tools beside them. A test compares them with the
# flags of `bridge_server`.
VARIABLES = frozenset(
    f"BRIDGE_{name}"
    for name in (
        "ADDRESS",
        "ALLOCATOR",
        "COMPILATION_CACHE",
        "CONFIG",
        "DEVICE",
        "DRAIN_S",
        "EXIT_WHEN_STUCK",
        "FACTORY",
        "FULL_TRACEBACKS",
        "GPU_MEMORY_FRACTION",
        "GPU_ORDER",
        "INSECURE",
        "JAX_MODEL",
        "LISTEN",
        "LOG_FORMAT",
        "LOG_LEVEL",
        "MAX_PROGRAMS",
        "MAX_RUNS",
        "MAX_WAITING",
        "MESH",
        "METRICS",
        "NO_COMPILATION_CACHE",
        "NO_JIT",
        "NO_REFLECTION",
        "NO_TRACEBACKS",
        "PROFILE",
        "RELOAD",
        "RESIDUAL_BYTES",
        "REVISION",
        "SESSION_SLAB_BYTES",
        "SLAB_MAX_BYTES",
        "SLOW_CALL_S",
        "STUCK_S",
        "TLS_CA",
        "TLS_CERT",
        "TLS_CLIENT_CA",
        "TLS_KEY",
        "TOKEN",
        "TOKEN_FILE",
        "TORCH_MODEL",
        "VIA_XLA",
        "WARMUP",
        "X64",
    )
)
_TITLES = r"(?m)^(?P<groups>[a-z]+:)$"
_FILES = ("FILE", "FILE.pyi", "PEM", "DIR", "[NAME=]TARGET")
_NOT_SHOWN = ("", math.inf, argparse.SUPPRESS)
# Of the project's tests, and of Kubernetes, for pods beside a Service that is named `bridge`.
_OF_OTHERS = (
    "BRIDGE_TEST_",
    "BRIDGE_TESTS_",
    "BRIDGE_LEAK_",
    "BRIDGE_SERVICE_",
    "BRIDGE_PORT",
)


def near_matches(word: str, choices: Collection[str]) -> list[str]:
    """Return the choices that resemble the word, best first."""
    return difflib.get_close_matches(word, choices, n=3, cutoff=0.5)


def did_you_mean(names: Collection[str]) -> str:
    """Return the end of a sentence that proposes names; empty if there are none."""
    if not names:
        return ""
    return f"; did you mean {' or '.join(map(repr, names))}?"


def unknown_variables() -> Iterator[str]:
    """Yield a sentence for each variable of this process that begins with BRIDGE_ in vain."""
    for name in sorted(os.environ):
        is_ours = name.startswith("BRIDGE_") and not name.startswith(_OF_OTHERS)
        if is_ours and name not in VARIABLES:
            near = difflib.get_close_matches(name, VARIABLES, n=1, cutoff=0.8)
            yield f"the variable {name} is unknown and ignored{did_you_mean(near)}"


class Help(argparse.HelpFormatter):
    """Help that shows defaults where these are values that a user would write.

    A description or epilog of several lines keeps them.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        default = action.default
        is_shown = type(default) in (int, float, str) and default not in _NOT_SHOWN
        if text and is_shown and "default" not in text and action.option_strings:
            text += " (default: %(default)s)"
        return text

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return textwrap.indent(text, indent)
        return super()._fill_text(text, width, indent)

    def _rich_fill_text(self, text: Any, width: int, indent: Any) -> Any:
        """Do the same for a text of the package rich."""
        if "\n" not in text.plain:
            fill: Any = super()
            return fill._rich_fill_text(text, width, indent)
        lines = (indent + line for line in text.split())
        return type(text)("\n").join(lines) + "\n\n"


def help_formatter(prog: str) -> argparse.HelpFormatter:
    """Return the formatter of a command's help, with colours on a terminal.

    Colours need the optional package rich-argparse; NO_COLOR turns them off.
    """
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    coloured = _coloured_help() if is_terminal and not is_plain else None
    return (coloured or Help)(prog=prog)


def _coloured_help() -> Callable[..., argparse.HelpFormatter] | None:
    try:
        from rich_argparse import RichHelpFormatter
    except ImportError:
        return None
    options = {
        "group_name_formatter": str,
        "text_markup": False,  # brackets are parts of flags' values
        "help_markup": False,
        "highlights": [*RichHelpFormatter.highlights, _TITLES],
    }
    return type("ColouredHelp", (Help, RichHelpFormatter), options)


class _Completion(argparse.Action):
    """Prints a shell's completion of the parser, by the optional package shtab."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            import shtab
        except ImportError:
            parser.error(
                'completion needs shtab: run `pip install "torch-jax-bridge[cli]"`'
            )
        _complete_files(parser, shtab.FILE)
        # A reader that takes only the first lines is no error.
        parser._print_message(f"{shtab.complete(parser, shell=values)}\n", sys.stdout)
        parser.exit(0)


def _complete_files(parser: argparse.ArgumentParser, files: Any) -> None:
    """Let a completion propose files for the options and arguments that name one."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, files)
        elif action.metavar in _FILES:
            vars(action)["complete"] = files


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Add the flag --print-completion."""
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=("bash", "zsh", "tcsh"),
        help="print a script that completes flags in this shell, and end",
    )


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, with similar flags and words."""

    def __init__(self, *args: Any, **how: Any) -> None:
        how.setdefault("formatter_class", help_formatter)
        super().__init__(*args, **how)

    def error(self, message: str) -> NoReturn:
        """Print the sentence, and exit with status 2."""
        if message.startswith(_UNRECOGNIZED):
            message = self._unrecognized(message.removeprefix(_UNRECOGNIZED).split())
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def list_commands(self, commands: Any, titles: Mapping[str, Sequence[str]]) -> None:
        """List subcommands in the help under titles, and the options after them."""
        self._positionals._group_actions.remove(commands)
        listed = {each.dest: each for each in commands._get_subactions()}
        for title, names in titles.items():
            group = self.add_argument_group(title)
            group._group_actions += [listed.pop(name) for name in names]
        assert not listed
        self._action_groups.sort(key=lambda group: group is self._optionals)

    def flags(self) -> set[str]:
        """Return all flags, with those of subcommands."""
        found = set[str]()
        for action in self._actions:
            found.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    found |= command.flags()
        return found

    def _unrecognized(self, words: list[str]) -> str:
        flags = [word.partition("=")[0] for word in words if word.startswith("-")]
        near = near_matches(flags[0], self.flags() - {flags[0]}) if flags else []
        return f"unrecognized arguments: {' '.join(words)}{did_you_mean(near[:1])}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = action.choices
        if choices is None or value in choices:
            return
        words = list(map(str, choices))
        raise argparse.ArgumentError(
            action,
            f"{value!r} is not one of {', '.join(words)}{did_you_mean(near_matches(value, words))}",
        )
