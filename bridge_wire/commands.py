"""Parsing shared by both commands: help, errors of one sentence with near matches, variables."""

import argparse
import difflib
import math
import os
from collections.abc import Collection, Iterator
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
    """Help that shows defaults where these are values that a user would write."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        default = action.default
        is_shown = type(default) in (int, float, str) and default not in _NOT_SHOWN
        if text and is_shown and "default" not in text and action.option_strings:
            text += " (default: %(default)s)"
        return text


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
        print(shtab.complete(parser, shell=values))
        parser.exit(0)


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
        how.setdefault("formatter_class", Help)
        super().__init__(*args, **how)

    def error(self, message: str) -> NoReturn:
        """Print the sentence, and exit with status 2."""
        if message.startswith(_UNRECOGNIZED):
            message = self._unrecognized(message.removeprefix(_UNRECOGNIZED).split())
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

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
