"""The flags of `bridge_server`, and the equivalent BRIDGE_* variables. Imports no framework."""

import argparse
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any

from bridge_server.process import config, devices, factories
from bridge_wire import __version__
from bridge_wire.commands import (
    DOCS,
    Parser,
    add_completion,
    did_you_mean,
    near_matches,
)
from bridge_wire.errors import CallerError

_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
_LISTED: dict[str, Any] = {"action": "append", "default": []}
_COMMANDS = ["doctor", "token", "config"]
# One of them from a higher place hides the others of lower places.
_GROUPS = ({"targets", "jax_model", "torch_model"}, {"listen", "port"})
# Kubernetes sets BRIDGE_PORT beside a Service that is named `bridge`.
_ENDING = {"help", "version", "print_completion", "parent_pid", "reload_fd"}
_WITHOUT_VARIABLE = {"targets", "port"} | _ENDING
_NOT_IN_FILE = {"config"} | _ENDING
_EPILOG = f"""\
commands:
  bridge_server doctor           check the environment instead
  bridge_server token NAME FILE  make a client's token
  bridge_server config show      show the options that are set, and by what

examples:
  bridge_server model.py:damped
  bridge_server --x64 wave=model.py:damped --warmup 'float32[100],float32[],float32[]'
  bridge_server model.py:damped --listen 0.0.0.0:50051 --token-file tokens

Every option but --port has a variable: --residual-bytes has BRIDGE_RESIDUAL_BYTES, and so on.
{DOCS} describes them."""
_LONGEST_REVISION = 200
_MOST_COUNTED = 1_000_000
_LAST_PORT = 65_535
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LONGEST_S = 86_400
_LARGEST = (1 << 63) - 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of flags, else of variables, else of the file of --config."""
    return _resolved(_parser(), argv)[0]


def show(argv: Sequence[str]) -> int:
    """Run `bridge_server config show`: print the options that are set, and by what.

    Returns the exit status. The output is a file for --config.
    """
    parser = _parser()
    parser.prog = "bridge_server config"
    if not argv or argv[0] != "show":
        parser.error("expected `bridge_server config show`, with the worker's options")
    options, origins = _resolved(parser, argv[1:])
    shown = {name: x for name, x in origins.items() if name not in _NOT_IN_FILE}
    print(config.as_toml(vars(options), shown))
    return 0


def _resolved(
    parser: Parser, argv: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Return the options, and the origin of each that is set."""
    argv = [_without_argument(*pair) for pair in pairwise([*argv, ""])]
    given = parser.parse_intermixed_args(argv)
    flags = {word.partition("=")[0] for word in argv}
    origins = {
        action.dest: "flag"
        for action in parser._actions
        if flags & set(action.option_strings)
    }
    if given.targets:
        origins["targets"] = "argument"
    path = given.config or os.environ.get("BRIDGE_CONFIG")
    lower: list[str] = []
    for words_of in (_from_variables, _from_file):
        taken = _replaced(origins)
        for action, origin, words in words_of(parser, path, taken):
            origins[action.dest] = origin
            _check_words(parser, action, origin, words)
            lower += words
    options = parser.parse_intermixed_args([*lower, *argv])
    try:
        options.factory = factories.parse(options.factory)
    except CallerError as error:
        parser.error(str(error))
    return options, origins


_Words = Iterator[tuple[argparse.Action, str, list[str]]]


def _from_variables(parser: Parser, path: str | None, taken: Collection[str]) -> _Words:
    """Yield the options that variables set, as words of the command line."""
    for action in parser._actions:
        variable = f"BRIDGE_{action.dest.upper()}"
        value = os.environ.get(variable)
        if value is None or action.dest in taken or action.dest in _WITHOUT_VARIABLE:
            continue
        flag = action.option_strings[-1]
        origin = f"variable {variable}"
        if action.nargs == 0:
            is_on = _is_on(parser, variable, value)
            yield action, origin, [flag] if is_on else []
            continue
        is_list = isinstance(action.default, list) and not _is_object(value)
        values = value.split() if is_list else [value]
        yield action, origin, [f"{flag}={each}" for each in values]


def _from_file(parser: Parser, path: str | None, taken: Collection[str]) -> _Words:
    """Yield the options that the file of --config sets, as words of the command line."""
    if not path:
        return
    by_name = {action.dest: action for action in parser._actions}
    try:
        values = config.read(path, by_name.keys() - _NOT_IN_FILE)
        for name, value in values.items():
            if name not in taken:
                action = by_name[name]
                yield action, f"file {path}", config.words(action, value, path)
    except CallerError as error:
        parser.error(str(error))


def _replaced(names: Collection[str]) -> set[str]:
    """Return options that are set, with those that mean the same in another form."""
    replaced = set(names)
    for group in _GROUPS:
        if group & replaced:
            replaced |= group
    return replaced


def _without_argument(word: str, following: str) -> str:
    """Return `--factory` such that argparse takes no target for its argument."""
    is_argument = factories.is_argument(following)
    return "--factory=" if word == "--factory" and not is_argument else word


def _is_object(text: str) -> bool:
    return text.lstrip().startswith("{")


def _is_on(parser: Parser, variable: str, value: str) -> bool:
    word = value.strip().lower()
    if word not in (*_ON, *_OFF):
        parser.error(f"the variable {variable} is {value!r}; expected 1 or 0")
    return word in _ON


def _check_words(
    parser: Parser,
    action: argparse.Action,
    origin: str,
    words: list[str],
) -> None:
    """Exit with an error that names the origin if the flag would refuse a value."""
    if action.nargs == 0:
        return
    flag = f"{action.option_strings[-1]}=" if action.option_strings else ""
    try:
        for word in words:
            parser._get_values(action, [word.removeprefix(flag)])
    except argparse.ArgumentError as error:
        name = "" if origin.startswith("variable") else f" {action.dest}"
        parser.error(f"the {origin}{name}: {error.message}")


def _parser() -> Parser:
    parser = Parser(
        "bridge_server",
        usage="bridge_server [options] [NAME=]TARGET ... | doctor | token | config",
        description=(
            "Serve JAX or torch models to programs in other processes. A TARGET is"
            " model.py:function or package.module:function."
        ),
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    add_completion(parser)
    for title, add_to in (
        ("models", _add_models),
        ("serving", _add_serving),
        ("limits", _add_limits),
        ("running", _add_running),
        ("security", _add_security),
    ):
        add_to(_adder(parser.add_argument_group(title)))
    parser.add_argument(
        "--version", action="version", version=f"bridge_server {__version__}"
    )
    return parser


def _adder(group: Any) -> Callable[..., Any]:
    def add(flag: str, help: str, **how: Any) -> None:
        group.add_argument(flag, help=help, **how)

    return add


def _add_models(add: Callable[..., Any]) -> None:
    add(
        "targets",
        "models of the framework that is installed or, of both, the one that their module imports",
        metavar="[NAME=]TARGET",
        nargs="*",
        type=_target,
    )
    add(
        "--jax-model",
        "function, (apply, params), flax or equinox module; repeatable",
        metavar="[NAME=]TARGET",
        **_LISTED,
    )
    add(
        "--torch-model",
        "function, nn.Module, or a pair of either and its parameters; repeatable",
        metavar="[NAME=]TARGET",
        **_LISTED,
    )
    add(
        "--via-xla",
        "run torch models through XLA, traced by torchax, also on JAX's devices",
        action="store_true",
    )
    add(
        "--factory",
        "the target is a function that returns the model; with arguments for it, of which each"
        " VALUE is JSON, or else text; repeatable",
        action="append",
        nargs="?",
        const="",
        default=[],
        metavar="NAME=VALUE",
    )
    add(
        "--warmup",
        "compile for these arguments before reporting healthy, e.g. float32[8,64]; repeatable",
        metavar="[NAME=]DTYPE[SHAPE],...",
        **_LISTED,
    )


def _add_serving(add: Callable[..., Any]) -> None:
    add(
        "--listen",
        "address; default: a socket in a directory that only you can enter",
        metavar="unix:PATH|HOST:PORT",
    )
    add(
        "--port",
        "the address 127.0.0.1:PORT, for this host only",
        type=_port,
        metavar="PORT",
    )
    add(
        "--revision",
        "text that names what is served, such as an image's digest; clients notice a change",
        metavar="TEXT",
        default="",
        type=_revision,
    )
    add(
        "--metrics",
        "serve numbers for Prometheus over HTTP, such as requests, seconds and errors",
        metavar="HOST:PORT",
    )
    add(
        "--log-level",
        "lowest level to log",
        choices=("debug", "info", "warning", "error"),
        default="info",
    )
    add(
        "--log-format",
        "form of the log's lines; default: text on a terminal, JSON elsewhere",
        choices=("text", "json"),
    )
    add(
        "--slow-call-s",
        "log the runs that take more seconds than this",
        type=_more_seconds,
        default=math.inf,
        metavar="SECONDS",
    )
    add(
        "--config",
        "TOML file with a table [worker] of these options, below flags and variables",
        metavar="FILE",
    )
    add("--parent-pid", argparse.SUPPRESS, type=int)
    add("--reload-fd", argparse.SUPPRESS, type=int)


def _add_limits(add: Callable[..., Any]) -> None:
    add(
        "--residual-bytes",
        "budget for residuals kept between forwards and their VJPs; over budget, backwards"
        " recompute; default: half of the memory of the host or the GPU",
        type=_bytes,
        metavar="BYTES",
    )
    add(
        "--session-slab-bytes",
        "limit of one client's shared memory; default: 1T",
        type=_bytes,
        default=1 << 40,
        metavar="BYTES",
    )
    add(
        "--max-programs",
        "compiled programs to keep for all clients; past it, those used longest ago are prepared"
        " again when they are needed",
        type=_count,
        default=1024,
        metavar="N",
    )
    _add_limits_of_runs(add)


def _add_limits_of_runs(add: Callable[..., Any]) -> None:
    add(
        "--max-runs",
        "runs under way at once, one of them kept for clients without a run; default: one more"
        " than there are cores",
        type=_count,
        metavar="N",
    )
    add(
        "--max-waiting",
        "runs that may wait for their turn; further calls are refused with the time to try again",
        type=_count,
        default=1024,
        metavar="N",
    )
    add(
        "--stuck-s",
        "seconds after which a run counts as stuck: `liveness` is then NOT_SERVING, and the log"
        " shows the threads' stacks",
        type=_more_seconds,
        default=600.0,
        metavar="SECONDS",
    )
    add(
        "--exit-when-stuck",
        "exit with status 1 once a run is stuck, for a supervisor to start the worker again",
        action="store_true",
    )
    add(
        "--drain-s",
        "time that calls have to finish after SIGTERM",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
    )


def _add_running(add: Callable[..., Any]) -> None:
    add(
        "--x64",
        "allow 64-bit floats and integers, which torch always has",
        action="store_true",
    )
    add(
        "--no-jit",
        "run JAX models operation by operation, for debugging",
        action="store_true",
    )
    add(
        "--compilation-cache",
        "directory that keeps compiled code for later starts, for this user alone; empty: none;"
        " default: in the user's cache",
        metavar="DIR",
    )
    add(
        "--no-compilation-cache",
        "compile anew at each start",
        action="store_true",
    )
    add(
        "--mesh",
        "shard JAX models over devices by ATTR_shardings in their modules",
        type=_mesh,
        default={},
        metavar="AXIS=SIZE,...",
    )
    add(
        "--device",
        "device of the models; default: the framework's choice, the first GPU if there is one",
        type=devices.parse_device,
        metavar="cpu|cuda|cuda:N|GPU-UUID",
    )
    add(
        "--gpu-memory-fraction",
        "limit of the framework's share of GPU memory; default: the framework's",
        type=devices.parse_fraction,
        metavar="F",
    )
    _add_debugging(add)


def _add_debugging(add: Callable[..., Any]) -> None:
    add(
        "--reload",
        "load the models again when their files change, for development",
        action="store_true",
    )
    add(
        "--full-tracebacks",
        "keep the frames of JAX, torch and the bridge in the tracebacks of models' errors",
        action="store_true",
    )
    add(
        "--no-tracebacks",
        "send clients a model's error without its traceback, which has source lines",
        action="store_true",
    )


def _add_security(add: Callable[..., Any]) -> None:
    add(
        "--token-file",
        "clients must present a token of this file, or the one in BRIDGE_TOKEN; see"
        " `bridge_server token --help`",
        metavar="FILE",
    )
    add("--tls-cert", "certificate for TCP, with --tls-key", metavar="PEM")
    add("--tls-key", "private key of --tls-cert", metavar="PEM")
    add(
        "--tls-client-ca",
        "accept only clients with a certificate of this authority",
        metavar="PEM",
    )
    add(
        "--no-reflection",
        "do not serve gRPC reflection",
        action="store_true",
    )
    add(
        "--insecure",
        "allow TCP beyond loopback without TLS or token",
        action="store_true",
    )


def _target(text: str) -> str:
    if ":" in text:
        return text
    hint = did_you_mean(near_matches(text, _COMMANDS))
    raise argparse.ArgumentTypeError(
        f"{text!r} is neither a target such as model.py:function or package.module:function, nor"
        f" one of the commands {', '.join(_COMMANDS)}{hint}"
    )


def _port(text: str) -> str:
    if not text.isdecimal() or int(text) > _LAST_PORT:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a port; expected a number up to {_LAST_PORT}; 0 takes a free one"
        )
    return text


def _bytes(text: str) -> int:
    number = text.rstrip("KMGTiB")
    unit = text[len(number) :].rstrip("iB")
    if not number.isdecimal() or unit not in _UNITS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; expected 1073741824, 512M or 2G"
        )
    size = int(number) * _UNITS[unit]
    if size > _LARGEST:
        raise argparse.ArgumentTypeError(
            f"{text!r} exceeds the address space; expected at most {_LARGEST}"
        )
    return size


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= _LONGEST_S:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time; expected seconds from 0 to {_LONGEST_S}"
        )
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < _MOST_COUNTED:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a count; expected a number from 1 to {_MOST_COUNTED - 1}"
        )
    return int(text)


def _more_seconds(text: str) -> float:
    seconds = _seconds(text)
    if not seconds:
        raise argparse.ArgumentTypeError(
            "'0' is no limit; expected more than 0 seconds"
        )
    return seconds


def _revision(text: str) -> str:
    if len(text) > _LONGEST_REVISION or not text.isprintable():
        raise argparse.ArgumentTypeError(
            f"{text[:100]!r} is not a revision; expected at most {_LONGEST_REVISION} printable"
            " characters"
        )
    return text


def _mesh(text: str) -> dict[str, int]:
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if (
            not name.isidentifier()
            or not size.isdecimal()
            or int(size) < 1
            or name in axes
        ):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a mesh; expected data=2,model=2"
            )
        axes[name] = int(size)
    return axes
