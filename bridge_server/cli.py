"""The command `bridge_server`.

Flags come before BRIDGE_* variables, and those before the defaults.
"""

import argparse
import io
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from bridge_server.process import devices, doctor, endpoints, targets
from bridge_server.process.malloc import restart_with_a_good_allocator
from bridge_server.process.parent import watch_parent
from bridge_server.process.shutdown import Stopped, StopSignals, end_as_orphan, end_at_the_latest
from bridge_server.runtime import Model, Options, Runtime
from bridge_server.serving.programs import Programs
from bridge_server.serving.sessions import Sessions
from bridge_server.serving.warmup import warm_up
from bridge_server.serving.worker import Security, Worker
from bridge_wire import __version__
from bridge_wire.errors import BridgeError, CallerError
from bridge_wire.memory.pool import half_of_memory

_log = logging.getLogger("bridge_server")

OK, FAILED, USAGE = 0, 1, 2
_DRAIN_S = 30.0
_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
_LAST_S = 5.0  # for what models do when the interpreter ends


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker until it is told to stop.

    Returns the exit status: 0 after a drain, 1 on failure, 2 on misuse.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["doctor"]:
        return doctor.main(argv[1:])
    options = _arguments(argv)
    _set_up_logging(options.log_level)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            line_buffering=True
        )  # what a model prints is for whoever reads the log now
    status = FAILED
    try:
        _serve(options)
        status = OK
    except Stopped:
        status = OK
    except BridgeError as error:
        print(f"bridge_server: {error}", file=sys.stderr)
        status = USAGE if isinstance(error, CallerError) else FAILED
    finally:
        end_at_the_latest(_LAST_S, status)
    return status


def _serve(options: argparse.Namespace) -> None:
    if options.jax_model and options.torch_model:
        raise CallerError(
            "--jax-model and --torch-model exclude each other: start one worker for each framework"
        )
    if not (options.jax_model or options.torch_model):
        raise CallerError(
            "nothing to serve: name a model with --jax-model or --torch-model module:attribute"
        )
    if options.via_xla and not options.torch_model:
        raise CallerError("--via-xla runs torch models through XLA: name one with --torch-model")
    endpoint = endpoints.parse(options.listen)
    security = _security(options, endpoint)
    restart_with_a_good_allocator()
    if endpoint.is_exposed and not security.is_any:
        _log.warning(
            "INSECURE: anyone who can reach %s can run this worker's models", endpoint.address
        )
    stop = StopSignals()
    # In the process that stays: a number means another device where fewer are seen.
    devices.choose(options.device, options.gpu_memory_fraction, is_spread=bool(options.mesh))
    if options.parent_pid:
        watch_parent(options.parent_pid, lambda: end_as_orphan(endpoint, stop))
    stdout = _copy_of_stdout()

    with stop.at_once():
        runtime = _runtime(options)
        models = _load(options.jax_model or options.torch_model, options.factory, runtime)
        _let_loggers_speak()
        devices.refuse_host(options.device, runtime)
        devices.make_ready(runtime)
    programs = Programs(runtime, models)
    sessions = Sessions(
        runtime,
        residual_bytes=_residual_bytes(options, runtime),
        slab_bytes=options.session_slab_bytes,
        on_failure=stop.give_up,
    )
    worker = Worker(runtime, programs, sessions, endpoint, security)
    is_drained = False
    try:
        with stop.at_once():
            for warmup in options.warmup:
                warm_up(programs, warmup)
        worker.announce_ready()
        found = ",".join(runtime.describe().devices)
        print(
            f"bridge_server ready endpoint={worker.address} models={','.join(models)}"
            f" lanes=local,grpc devices={found}",
            file=stdout,
            flush=True,
        )
        stop.wait()
        if not stop.has_given_up:
            _log.info("draining: no new work; waiting for the calls under way")
            is_drained = worker.drain(_DRAIN_S)
            if not is_drained:
                _log.warning("gave up on calls that were still running after %g s", _DRAIN_S)
    finally:
        worker.close()
    if not is_drained:
        # What frameworks tear down at the interpreter's end may wait for the GPU, or crash; and the
        # interpreter itself would wait for the calls.
        os._exit(FAILED)


def _copy_of_stdout() -> TextIO:
    """Return this process's stdout as it is before models are imported, which may replace it or
    close it."""
    try:
        return os.fdopen(os.dup(sys.stdout.fileno()), "w")
    except (AttributeError, OSError):  # there is none, or one without a descriptor
        return sys.stdout


def _runtime(options: argparse.Namespace) -> Runtime:
    framework = "jax" if options.jax_model else "torch"
    if options.mesh and framework != "jax":
        raise CallerError(f"--mesh is for JAX models, and these are {framework}'s")
    how = Options(
        x64=options.x64,
        jit=not options.no_jit,
        mesh=options.mesh,
        gpu_memory_fraction=options.gpu_memory_fraction,
    )
    try:
        if options.via_xla:
            from bridge_server.torch_via_xla import XlaRuntime

            return XlaRuntime(how)
        if framework == "torch":
            from bridge_server.torch_runtime import TorchRuntime

            return TorchRuntime(how)
        from bridge_server.jax_runtime import JaxRuntime

        return JaxRuntime(how)
    except ImportError as error:
        needed = "jax and torchax beside torch" if options.via_xla else framework
        raise CallerError(
            f"--{framework}-model needs {needed} in the worker's environment: {error}"
        ) from error


def _residual_bytes(options: argparse.Namespace, runtime: Runtime) -> int:
    if options.residual_bytes is not None:
        return int(options.residual_bytes)
    of_device = runtime.memory_bytes()
    return half_of_memory() if of_device is None else of_device // 2


def _load(texts: Sequence[str], is_factory: bool, runtime: Runtime) -> Mapping[str, Model]:
    models: dict[str, Model] = {}
    for text in texts:
        target = targets.parse(text)
        if target.name in models:
            raise CallerError(f"two models are named {target.name!r}; write NAME={text}")
        value = targets.load(target)
        if is_factory:
            with targets.no_exit(f"the factory {text!r}"):
                value = value()
        model = runtime.adapt(target.name, value)
        shardings = targets.shardings_beside(target)
        models[target.name] = runtime.spread(model, shardings) if shardings else model
    return models


def _security(options: argparse.Namespace, endpoint: endpoints.Endpoint) -> Security:
    if bool(options.tls_cert) != bool(options.tls_key):
        raise CallerError("--tls-cert and --tls-key go together")
    try:
        token = _token(options.token_file)
        certificate = Path(options.tls_cert).read_bytes() if options.tls_cert else None
        key = Path(options.tls_key).read_bytes() if options.tls_key else None
    except OSError as error:
        raise CallerError(f"cannot read {error.filename}: {error.strerror}") from error
    security = Security(token, certificate, key)
    if endpoint.is_exposed and not security.is_any and not options.insecure:
        raise CallerError(
            f"{endpoint.address} can be reached from other hosts: set --token-file (or"
            " BRIDGE_TOKEN) or --tls-cert and --tls-key, listen on a loopback address or a unix:"
            " socket, or accept the risk with --insecure"
        )
    return security


def _token(file: str | None) -> str | None:
    """Return the token that clients must present, if there is one."""
    token = (
        Path(file).read_text(errors="replace").strip()
        if file
        else os.environ.get("BRIDGE_TOKEN", "").strip()
    )
    if file and not token:
        raise CallerError(
            f"the token file {file} is empty; write a token to it, or leave --token-file out"
        )
    # gRPC carries nothing else in a header.
    if not (token.isascii() and token.isprintable()):
        raise CallerError(
            "a token consists of printable ASCII characters, such as `openssl rand -hex 32` prints"
        )
    return token or None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bridge_server",
        description=(
            "Serve JAX or torch models to programs in other processes. `bridge_server doctor` looks"
            " at the environment instead."
        ),
        epilog=(
            "Every option may also come as a variable: --residual-bytes as BRIDGE_RESIDUAL_BYTES,"
            " and so on."
        ),
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(flag: str, help: str, **how: Any) -> None:
        parser.add_argument(flag, help=help, **how)

    listed = {"action": "append", "default": []}
    add(
        "--jax-model",
        "function, (apply, params), flax or equinox module; repeatable",
        metavar="[NAME=]MOD:ATTR",
        **listed,
    )
    add(
        "--torch-model",
        "function, nn.Module, or a pair of either and its parameters; repeatable",
        metavar="[NAME=]MOD:ATTR",
        **listed,
    )
    add(
        "--via-xla",
        "run torch models through XLA, traced by torchax: also on JAX's devices",
        action="store_true",
    )
    add("--factory", "MOD:ATTR is a function that returns the model", action="store_true")
    add(
        "--listen",
        "default: a socket in a directory that only you can enter",
        metavar="unix:PATH|HOST:PORT",
    )
    add("--x64", "allow 64-bit floats and integers, which torch always has", action="store_true")
    add("--no-jit", "run JAX models operation by operation, for debugging", action="store_true")
    add(
        "--mesh",
        "spread JAX models over devices; their modules say how, in ATTR_shardings",
        type=_mesh,
        default={},
        metavar="AXIS=SIZE,...",
    )
    add(
        "--device",
        "what models run on; default: the framework's choice, the first GPU if it finds one",
        type=devices.parse_device,
        metavar="cpu|cuda|cuda:N|GPU-UUID",
    )
    add(
        "--gpu-memory-fraction",
        "most of the GPU's memory that the framework may take; default: the framework's",
        type=devices.parse_fraction,
        metavar="F",
    )
    add(
        "--residual-bytes",
        "budget for what is kept between forwards and their VJPs; past it backwards recompute; "
        "default: half of the memory, of the host or the GPU",
        type=_bytes,
        metavar="BYTES",
    )
    add(
        "--session-slab-bytes",
        "most memory that one client may share",
        type=_bytes,
        default=1 << 40,
        metavar="BYTES",
    )
    add(
        "--warmup",
        "compile for these arguments before reporting healthy, e.g. float32[8,64]; repeatable",
        metavar="[NAME=]DTYPE[SHAPE],...",
        **listed,
    )
    add(
        "--token-file",
        "clients must present the token in this file, or in BRIDGE_TOKEN",
        metavar="FILE",
    )
    add("--tls-cert", "certificate for TCP, with --tls-key", metavar="PEM")
    add("--tls-key", "private key of --tls-cert", metavar="PEM")
    add("--insecure", "allow TCP beyond loopback without TLS or token", action="store_true")
    add(
        "--log-level",
        "least level that is logged",
        choices=("debug", "info", "warning", "error"),
        default="info",
    )
    add("--parent-pid", argparse.SUPPRESS, type=int)
    parser.add_argument("--version", action="version", version=f"bridge_server {__version__}")
    return parser


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options, those from variables parsed as if they stood before the command
    line's."""
    parser = _parser()
    from_variables: list[str] = []
    for action in parser._actions:
        flag = action.option_strings[-1]
        value = os.environ.get(f"BRIDGE_{action.dest.upper()}")
        if (
            value is None
            or flag in ("--version", "--help")
            or any(word.partition("=")[0] == flag for word in argv)
        ):
            continue
        if action.nargs == 0:
            from_variables += [flag] if _is_on(parser, flag, value) else []
        else:
            values = value.split() if isinstance(action.default, list) else [value]
            from_variables += [f"{flag}={each}" for each in values]
    return parser.parse_args([*from_variables, *argv])


def _is_on(parser: argparse.ArgumentParser, flag: str, value: str) -> bool:
    word = value.strip().lower()
    if word not in (*_ON, *_OFF):
        parser.error(f"the variable for {flag} is {value!r}; expected 1 or 0")
    return word in _ON


def _bytes(text: str) -> int:
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number = text.rstrip("KMGTiB")
    unit = text[len(number) :].rstrip("iB")
    if not number.isdecimal() or unit not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 1073741824, 512M or 2G")
    return int(number) * units[unit]


def _mesh(text: str) -> dict[str, int]:
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name.isidentifier() or not size.isdecimal() or int(size) < 1 or name in axes:
            raise argparse.ArgumentTypeError(f"{text!r} is no mesh such as data=2,model=2")
        axes[name] = int(size)
    return axes


def _set_up_logging(level: str) -> None:
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(text if sys.stderr.isatty() else _JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("bridge_server", "bridge_wire"):
        logging.getLogger(name).setLevel(level.upper())


def _let_loggers_speak() -> None:
    """Turn the worker's loggers on again: a module that calls logging.config turns off all that
    it does not name."""
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.startswith(("bridge_server", "bridge_wire")):
            logger.disabled = False


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, for log collectors and for the parent of a spawned worker."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        return json.dumps(
            {"time": when, "level": record.levelname, "logger": record.name, "message": message}
        )
