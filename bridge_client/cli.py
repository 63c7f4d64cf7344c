"""The command `bridge_client`: inspects a worker from the client's side. Imports no framework."""

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_client.commands import calls, canary, describe, doctor, envs, ps, stubs, top
from bridge_client.commands.health import SERVING, health_of
from bridge_client.remote.connecting import connect
from bridge_client.remote.link import Terms, Tls
from bridge_client.remote.session import RemoteSession
from bridge_client.remote.spans import PROFILE
from bridge_client.remote.worker_addresses import resolved
from bridge_client.session import ModelInfo, Session
from bridge_wire import __version__, specs
from bridge_wire.commands import DOCS, Parser, add_completion, unknown_variables
from bridge_wire.doctor.checks import BROKEN, as_json, as_table, worst
from bridge_wire.errors import BridgeError, CallerError
from bridge_wire.specs import Spec

if TYPE_CHECKING:
    from bridge_client.commands.gradients import Check

OK, FAILED, MISUSE = 0, 1, 2
_ADDRESS = "unix:PATH or HOST:PORT; default: the socket of a worker without --listen"
# Words of Python's API in errors, and the command's.
_IN_FLAGS = {
    "; pass token= or token_file=": "; give --token-file, or set BRIDGE_TOKEN_FILE",
    "; pass another token= or token_file=": "; give another --token-file",
    "; pick one with name=": "; pick one with --model",
    "tls= or --tls-ca": "--tls-ca",
}
_COMMANDS = {
    "workers": ("describe", "ps", "health", "top", "doctor"),
    "models": ("call", "bench", "check-gradients", "stubs"),
    "programs": ("profile", "envs"),
}
_EPILOG = f"""\
examples:
  bridge_client describe
  bridge_client call unix:/run/bridge/bridge.sock '[0, 1.5]' 2 0.3
  bridge_client doctor localhost:50051 --tls-ca ca.pem --token-file token

Most commands find a worker without --listen by themselves. {DOCS} describes them."""
_EXAMPLES = {
    "describe": ("", "localhost:50051 --json"),
    "ps": ("", "--json"),
    "health": ("--wait 60", "localhost:50051 --deep --token-file token"),
    "top": ("", "--once --json"),
    "doctor": ("", "unix:/run/bridge/bridge.sock"),
    "call": (
        "unix:/run/bridge/bridge.sock '[0, 1.5]' 2 0.3",
        "localhost:50051 --model wave --input 'int32[2]' '[1, 2]'",
    ),
    "bench": ("--input 'float32[100],float32[],float32[]'",),
    "check-gradients": ("--input 'float32[100],float32[],float32[]' --seed 1",),
    "stubs": ("-o served.pyi", "localhost:50051 --client numpy"),
    "profile": ("python train.py", "-o calls.json -- python -m train --fast"),
    "envs": ("", "--prune 7"),
}
_LONGEST_S = 86_400
# Range of random arguments: away from zero, where many functions have kinks and poles.
_LOW, _HIGH = 0.25, 1.75
_UNUSED_DAYS = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0; 1 on failure; 2 on misuse."""
    options = _parser().parse_args(argv)
    if options.action is not _profile:  # whose program may want them
        # The lines of gRPC's core would stand before the command's own sentence.
        environ.setdefault("GRPC_VERBOSITY", "NONE")
    for sentence in unknown_variables():
        print(f"bridge_client: {sentence}", file=sys.stderr)
    try:
        status: int = options.action(options)
        return status
    except _Misuse as error:
        print(f"bridge_client: {error}", file=sys.stderr)
        return MISUSE
    except (BridgeError, OSError) as error:
        print(f"bridge_client: {_in_flags(str(error))}", file=sys.stderr)
        return FAILED


def _in_flags(text: str) -> str:
    for words, flags in _IN_FLAGS.items():
        text = text.replace(words, flags)
    return text


class _Misuse(Exception):
    """The command line asks for something that this worker cannot do."""


def _parser() -> Parser:
    parser = Parser(
        "bridge_client",
        usage="bridge_client COMMAND [options]",
        description="Look at bridge workers, and call their models.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--version", action="version", version=f"bridge_client {__version__}"
    )
    add_completion(parser)
    commands = parser.add_subparsers(
        prog="bridge_client", metavar="COMMAND", dest="command", required=True
    )
    show = commands.add_parser(
        "describe", help="show a worker's models, and how its tensors would travel"
    )
    show.add_argument("--json", action="store_true", help="print a JSON object")
    show.set_defaults(action=_with_session(_describe))
    check = _add_check_gradients(commands)
    health = _add_health(commands)
    diagnose = _add_doctor(commands)
    types = _add_stubs(commands)
    watch = _add_top(commands)
    _add_profile(commands)
    _add_envs(commands)
    _add_ps(commands)
    for command in (show, check, health, types, watch):
        command.add_argument("address", type=_address, nargs="?", help=_ADDRESS)
    diagnose.add_argument(
        "address", type=_address, nargs="?", help="unix:PATH or HOST:PORT"
    )
    callers = _add_call(commands), _add_bench(commands)
    for command in (show, check, diagnose, health, types, watch, *callers):
        _add_tokens(command)
        _add_tls(command)
    parser.list_commands(commands, _COMMANDS)
    for name, words in _EXAMPLES.items():
        lines = (f"\n  bridge_client {name} {each}".rstrip(" ") for each in words)
        commands.choices[name].epilog = f"examples:{''.join(lines)}"
    return parser


def _add_tokens(command: argparse.ArgumentParser) -> None:
    group = command.add_mutually_exclusive_group()
    group.add_argument(
        "--token",
        type=_token,
        help="for a worker with tokens (BRIDGE_TOKEN); others may see it in the list of processes",
    )
    group.add_argument(
        "--token-file",
        metavar="FILE",
        help="a file with the token (BRIDGE_TOKEN_FILE)",
    )


def _add_tls(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--tls-ca",
        metavar="PEM",
        help="use TLS, and trust this authority (BRIDGE_TLS_CA)",
        type=Path,
        default=environ.get("BRIDGE_TLS_CA") or None,
    )
    add(
        "--tls-cert",
        metavar="PEM",
        help="certificate of this client, for a worker with --tls-client-ca",
        type=Path,
    )
    add("--tls-key", metavar="PEM", help="private key of --tls-cert", type=Path)


def _add_check_gradients(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "check-gradients",
        help="compare a model's VJP, JVP and finite differences",
        description=(
            "Compare the derivatives of a worker's models with finite differences, at random"
            " arguments of the types given by --input, or else by the worker's --warmup. Exits with"
            " status 1 on a mismatch."
        ),
    )
    add = command.add_argument
    add("--model", metavar="NAME", help="default: each model whose arguments are known")
    add(
        "--input",
        metavar="DTYPE[SHAPE],...",
        type=_specs,
        help="e.g. float64[3,4],int32[3]",
    )
    add(
        "--range",
        nargs=2,
        type=_finite,
        metavar=("LOW", "HIGH"),
        help="of the arguments' numbers",
        default=(_LOW, _HIGH),
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of the random numbers (default: %(default)s)",
    )
    add("--json", action="store_true", help="print a JSON object")
    command.set_defaults(action=_with_session(_check_gradients))
    return command


def _add_health(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "health",
        help="ask whether a worker takes calls, as a probe",
        description=(
            "Ask a worker's health service, which needs no token. Exits with status 0 if it is"
            " SERVING and, with --deep, has answered a call, and with 1 otherwise."
        ),
    )
    command.add_argument(
        "--timeout",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="default: %(default)g",
    )
    command.add_argument(
        "--wait",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="wait so long for a worker that is still starting; default: not at all",
    )
    command.add_argument(
        "--service",
        choices=("readiness", "liveness"),
        default="",
        help="readiness, the default: it takes calls; liveness: its runs end",
    )
    command.add_argument(
        "--deep",
        action="store_true",
        help="also make a call of a model, within --timeout; needs the token",
    )
    command.add_argument("--json", action="store_true", help="print lines of JSON")
    command.set_defaults(action=_health)
    return command


def _add_stubs(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "stubs",
        help="write the models' signatures for editors and type checkers",
        description=(
            "Print a stub file with a class for each model of a worker, so that editors show the"
            " arguments, defaults and docstrings of remote functions."
        ),
    )
    add = command.add_argument
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FILE.pyi",
        help="write this file instead, if it is new or was written by this command",
    )
    add(
        "--client",
        choices=stubs.CLIENTS,
        help="default: torch for JAX models, jax for torch models",
    )
    add("--force", action="store_true", help="replace a file of another author")
    command.set_defaults(action=_with_session(_stubs))
    return command


def _add_top(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "top",
        help="show what a worker does: requests, seconds, clients, memory",
        description=(
            "Show a worker's rates and sizes, again and again until Ctrl-C. The first table is of"
            " the time since the worker's start."
        ),
    )
    command.add_argument("--once", action="store_true", help="print one table and end")
    command.add_argument("--json", action="store_true", help="print JSON lines")
    command.set_defaults(action=_with_session(_top))
    return command


def _add_profile(commands: Any) -> None:
    command: argparse.ArgumentParser = commands.add_parser(
        "profile",
        help="run a command, and write its calls to a file that Perfetto opens",
        description=(
            "Run a command whose Python process calls workers, such as `python train.py`. Its calls"
            " and what the workers did for them go to one file, on one clock. Exits with the"
            " command's status."
        ),
    )
    command.add_argument(
        "-o", "--output", default="bridge.json", help="default: %(default)s"
    )
    command.add_argument("command_line", nargs="+", metavar="COMMAND")
    command.set_defaults(action=_profile)


def _add_envs(commands: Any) -> None:
    command: argparse.ArgumentParser = commands.add_parser(
        "envs",
        help="list or remove the environments that spawn has made",
        description=(
            "List the environments that spawn(requirements=...) has made in this user's cache, with"
            " their sizes. Files that uv shares between environments are counted in each."
        ),
    )
    command.add_argument(
        "--prune",
        type=_days,
        nargs="?",
        const=_UNUSED_DAYS,
        metavar="DAYS",
        help="remove those that no worker uses or has used for so many days, 30 by default",
    )
    command.add_argument("--json", action="store_true", help="print a line of JSON")
    command.set_defaults(action=_envs)


def _add_call(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "call",
        help="call a model with numbers",
        description=(
            "Call a model with numbers or nested lists of them, and print each output's type and"
            " values. Arrays are float32, or float64 for a worker with --x64, unless --input gives"
            " their types."
        ),
    )
    command.add_argument("address", type=_address, help="unix:PATH or HOST:PORT")
    # Not "*", which argparse takes for empty before the first option.
    command.add_argument("arguments", nargs="+", metavar="JSON", type=_json)
    # argparse takes -1e-3 for a flag.
    command._negative_number_matcher = re.compile(r"-(\d|Infinity$).*")
    _add_model(command)
    command.add_argument("--json", action="store_true", help="print a line of JSON")
    command.set_defaults(action=_with_session(_call))
    return command


def _add_bench(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure calls of a model",
        description=(
            "Call a model on zeros for two seconds, with arrays of the types given by --input, or"
            " else by the worker's --warmup."
        ),
    )
    command.add_argument("address", type=_address, nargs="?", help=_ADDRESS)
    _add_model(command)
    command.add_argument("--json", action="store_true", help="print a line of JSON")
    command.set_defaults(action=_with_session(_bench))
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", metavar="NAME", help="one of several models")
    command.add_argument(
        "--input",
        metavar="DTYPE[SHAPE],...",
        type=_specs,
        help="e.g. float64[3,4],int32[3]",
    )


def _add_ps(commands: Any) -> None:
    command: argparse.ArgumentParser = commands.add_parser(
        "ps",
        help="list this user's workers on this host",
        description=(
            "List the workers of this user that run on this host, with their addresses and health."
            " Those in other containers are not seen."
        ),
    )
    command.add_argument("--json", action="store_true", help="print a line of JSON")
    command.set_defaults(action=_ps)


def _add_doctor(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="look for faults and slow paths, on this host and on the way to a worker",
        description=(
            "Look at this host and environment and, given an address, at the worker there. Exits"
            " with status 1 if something is broken; a slow path still works."
        ),
    )
    command.add_argument("--json", action="store_true", help="print a JSON object")
    command.set_defaults(action=_doctor)
    return command


def _address(text: str) -> str:
    try:
        return resolved(text)
    except CallerError as error:
        raise argparse.ArgumentTypeError(
            str(error).replace("address=", "", 1)
        ) from None


def _token(text: str) -> str:
    if not (text.isascii() and text.isprintable()):
        raise argparse.ArgumentTypeError("a token is printable ASCII")
    return text


def _number_of(text: str) -> float:
    """Return a number, or NaN for any other text."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _finite(text: str) -> float:
    value = _number_of(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _seconds(text: str) -> float:
    value = _number_of(text)
    if not 0 < value <= _LONGEST_S:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time; expected seconds above 0 and at most {_LONGEST_S}, such as"
            " 2.5"
        )
    return value


def _days(text: str) -> float:
    value = _number_of(text)
    if not 0 <= value <= _LONGEST_S:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of days; expected 0 or more, such as 30"
        )
    return value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r} is not JSON; expected a number or lists, such as '[1.5, 2]'"
        ) from None


def _specs(text: str) -> tuple[Spec, ...]:
    try:
        return specs.parse(text)
    except CallerError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _with_session(
    action: Callable[[RemoteSession, argparse.Namespace], int],
) -> Callable[[argparse.Namespace], int]:
    """Return the action on a session with the worker that the options name."""

    def act(options: argparse.Namespace) -> int:
        terms = _terms(options)
        with connect(
            options.address,
            token=terms.token,
            tls=terms.tls,
            token_file=terms.token_file,
        ) as session:
            return action(session, options)

    return act


def _terms(options: argparse.Namespace) -> Terms:
    """Return the token and certificates of the flags, or else of the variables."""
    token, file = options.token, options.token_file
    if token is None and file is None:
        token = environ.get("BRIDGE_TOKEN") or None
        file = None if token else environ.get("BRIDGE_TOKEN_FILE") or None
    terms = Terms(token, _tls(options), token_file=file)
    try:
        terms.current_token()
    except CallerError as error:
        raise _Misuse(str(error)) from error
    return terms


def _tls(options: argparse.Namespace) -> Tls | None:
    if bool(options.tls_cert) != bool(options.tls_key):
        raise _Misuse("--tls-cert and --tls-key go together")
    if not (options.tls_ca or options.tls_cert):
        return None
    paths = (options.tls_ca, options.tls_cert, options.tls_key)
    try:
        return Tls(*(path.read_bytes() if path else None for path in paths))
    except OSError as error:
        raise _Misuse(f"cannot read {error.filename}: {error.strerror}") from error


def _health(options: argparse.Namespace) -> int:
    with health_of(options.address, _tls(options)) as health:
        status = health.wait(options.wait) if options.wait else SERVING
        if status == SERVING:
            status = health.status(options.timeout, options.service)
    print(json.dumps({"status": status}) if options.json else status)
    if status != SERVING:
        return FAILED
    return _with_session(_call_once)(options) if options.deep else OK


def _call_once(session: Session, options: argparse.Namespace) -> int:
    done = canary.run(session, options.timeout)
    print(json.dumps({"call": done}) if options.json else done)
    return OK


def _doctor(options: argparse.Namespace) -> int:
    checks = list(doctor.examine(options.address, _terms(options)))
    print(as_json(checks) if options.json else as_table(checks))
    return FAILED if worst(checks) == BROKEN else OK


def _envs(options: argparse.Namespace) -> int:
    if options.prune is None:
        envs.show(options.json)
    else:
        envs.prune(options.prune, options.json)
    return OK


def _call(session: Session, options: argparse.Namespace) -> int:
    arguments = options.arguments
    outputs = calls.call(session, options.model, arguments, options.input)
    if options.json:
        print(json.dumps({"outputs": outputs}))
        return OK
    for each in outputs:
        print(each["spec"], json.dumps(each["value"]))
    return OK


def _bench(session: Session, options: argparse.Namespace) -> int:
    for model, arrays in _signatures(session, options):
        row = calls.bench(session, model.name, arrays)
        if options.json:
            print(json.dumps(row))
            continue
        print(
            f"{model.name}({', '.join(row['types'])}): median {row['median_ms']:.3f} ms, p99"
            f" {row['p99_ms']:.3f} ms, {row['calls_per_second']:.0f} calls/s"
        )
    return OK


def _ps(options: argparse.Namespace) -> int:
    ps.show(options.json)
    return OK


def _profile(options: argparse.Namespace) -> int:
    path = os.path.abspath(options.output)
    done = subprocess.run(options.command_line, env=os.environ | {PROFILE: path})
    print(
        f"bridge_client: {path}; open it with https://ui.perfetto.dev", file=sys.stderr
    )
    return done.returncode


def _top(session: RemoteSession, options: argparse.Namespace) -> int:
    with contextlib.suppress(KeyboardInterrupt):
        top.show(session, is_once=options.once, is_json=options.json)
    return OK


def _describe(session: RemoteSession, options: argparse.Namespace) -> int:
    describe.show(session, options.json)
    return OK


def _stubs(session: Session, options: argparse.Namespace) -> int:
    text = stubs.source(session.models, session.framework, options.client)
    if options.output is None:
        print(text.decode(), end="")
    else:
        stubs.write(text, options.output, options.force)
    return OK


def _check_gradients(session: Session, options: argparse.Namespace) -> int:
    low, high = options.range
    if low > high:
        raise _Misuse(f"--range {low:g} {high:g} is empty; LOW must be at most HIGH")
    try:
        from bridge_client.commands.gradients import check_gradients  # imports NumPy
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        raise CallerError(
            "check-gradients computes with NumPy, which is not installed here; run"
            ' `pip install "torch-jax-bridge[numpy]"`'
        ) from error
    checks: list[Check] = []
    rows: list[dict[str, object]] = []
    for model, arrays in _signatures(session, options):
        made = check_gradients(
            session, model, arrays, seed=options.seed, low=low, high=high
        )
        rows += [_as_object(model, check) for check in made]
        if not options.json:
            print(f"{model.name}({', '.join(map(str, arrays))})\n{_table(made)}\n")
        checks += made
    wrong = sum(not check.agrees for check in checks)
    if options.json:
        print(json.dumps({"differ": wrong, "checks": rows}))
        return FAILED if wrong else OK
    print(
        f"{wrong} of {len(checks)} derivatives differ"
        if wrong
        else f"all {len(checks)} derivatives agree"
    )
    return FAILED if wrong else OK


def _as_object(model: ModelInfo, check: "Check") -> dict[str, object]:
    return {
        "model": model.name,
        "output": check.output,
        "input": check.input,
        "vjp": check.vjp,
        "jvp": check.jvp,
        "differences": check.difference,
        "agrees": check.agrees,
    }


def _signatures(
    session: Session, options: argparse.Namespace
) -> list[tuple[ModelInfo, tuple[Spec, ...]]]:
    """Return the models that are to be checked, each with the types of its arguments."""
    if options.input is not None:
        return [(session.model(options.model), options.input)]
    models = (
        session.models.values()
        if options.model is None
        else [session.model(options.model)]
    )
    found = [(model, arrays) for model in models for arrays in model.signatures]
    if not found:
        raise _Misuse(
            f"the argument types of {options.model or 'the models'} are unknown: give --input, or"
            " start the worker with --warmup"
        )
    return found


def _table(checks: "Sequence[Check]") -> str:
    rows = [("output", "input", "VJP", "JVP", "differences", "")]
    for check in checks:
        numbers = (_number(check.vjp), _number(check.jvp), _number(check.difference))
        rows.append(
            (check.output, check.input, *numbers, "ok" if check.agrees else "MISMATCH")
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust)
    lines = (
        [
            side(text, width)
            for side, text, width in zip(sides, row, widths, strict=True)
        ]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
