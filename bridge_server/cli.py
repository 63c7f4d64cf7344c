"""The command `bridge_server`: loads models, serves them, and drains on a signal.

Precedence: flags, then BRIDGE_* variables, then defaults. Imports a framework only in `_runtime`.
"""

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

# gRPC reads it when it is imported. Its own lines on stderr are not JSON, as the log's are.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from bridge_server.model_errors import FULL_TRACEBACKS, NO_TRACEBACKS
from bridge_server.process import (
    compiled,
    devices,
    doctor,
    endpoints,
    factories,
    logs,
    targets,
    tokens,
)
from bridge_server.process.certificates import Certificates
from bridge_server.process.frameworks import framework_of
from bridge_server.process.malloc import restart_with_a_good_allocator
from bridge_server.process.options import parse, show
from bridge_server.process.parent import watch_parent
from bridge_server.process.reload import Handover, Supervisor
from bridge_server.process.service_manager import ServiceManager
from bridge_server.process.shutdown import (
    Stopped,
    StopSignals,
    end_as_orphan,
    end_at_the_latest,
    end_without_finalization,
)
from bridge_server.runtime import Model, Options, Runtime
from bridge_server.serving.exporter import export
from bridge_server.serving.programs import Programs
from bridge_server.serving.sessions import Sessions
from bridge_server.serving.warmup import warm_up
from bridge_server.serving.worker import Security, Worker
from bridge_wire.commands import unknown_variables
from bridge_wire.errors import BridgeError, CallerError
from bridge_wire.memory.pool import half_of_memory

_log = logging.getLogger("bridge_server")

OK, FAILED, USAGE = 0, 1, 2
_LAST_S = 5.0  # for cleanup by models when the interpreter exits


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker until a signal stops it.

    Returns the exit status: 0 after a drain, 1 on failure, 2 on misuse.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    for name, command in (
        ("doctor", doctor.main),
        ("token", tokens.main),
        ("config", show),
    ):
        if argv[:1] == [name]:
            return command(argv[1:])
    options = parse(argv)
    logs.set_up(options.log_level, options.log_format)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A reader of the log sees a model's prints at once.
        sys.stdout.reconfigure(line_buffering=True)
    if options.reload and options.reload_fd is None:
        return Supervisor(argv, options).run()
    for sentence in unknown_variables():
        _log.warning("%s", sentence)
    status = FAILED
    try:
        _serve(options)
        status = OK
    except Stopped:
        # XLA compiles in threads of its own: the interpreter's end waited for them, and crashed.
        logging.shutdown()
        os._exit(OK)
    except BridgeError as error:
        print(f"bridge_server: {error}", file=sys.stderr)
        status = USAGE if isinstance(error, CallerError) else FAILED
    finally:
        end_at_the_latest(_LAST_S, status)
    if status == OK:
        end_without_finalization(OK)
    return status


def _serve(options: argparse.Namespace) -> None:
    _check(options)
    endpoint = endpoints.parse(options.listen)
    security = _security(options, endpoint)
    restart_with_a_good_allocator()
    manager = ServiceManager()
    _warn_if_exposed(endpoint, security)
    _choose_tracebacks(options)
    stop = StopSignals()
    # After the restart, which could hide other GPUs: a number would then name another device.
    devices.choose(
        options.device, options.gpu_memory_fraction, is_spread=bool(options.mesh)
    )
    if options.parent_pid:
        watch_parent(options.parent_pid, lambda: end_as_orphan(endpoint, stop.request))
    handover = Handover(options.reload_fd, stop)
    compiled.keep("" if options.no_compilation_cache else options.compilation_cache)
    stdout = _copy_of_stdout()
    with stop.at_once():
        runtime, models = _runtime_with_models(options)
    sessions = _sessions(options, runtime, stop)
    most = options.max_programs
    programs = Programs(runtime, models, options.revision, sessions.meters, most)
    if options.reload:
        with stop.at_once():  # before the previous worker ends
            _warm_up(programs, options.warmup)
            handover.wait_for_turn()
    if options.metrics:
        _export(options.metrics, sessions)
    how = endpoint, security, options.stuck_s
    worker = Worker(runtime, programs, sessions, *how, _on_stuck(options, stop))
    is_drained = False
    try:
        with stop.at_once(worker.remove_sockets):
            _warm_up(programs, options.warmup)
        worker.announce_ready()
        _print_ready(worker, models, runtime, stdout)
        manager.note_ready(worker.address)
        handover.note_serving(worker.address)
        stop.wait(security.reload)
        manager.note_stopping()
        is_drained = _drain(worker, stop, options.drain_s)
    finally:
        worker.close()
    if not is_drained:
        # A framework's cleanup at the interpreter's end may wait for the GPU, or crash; and the
        # interpreter itself would wait for the calls.
        os._exit(FAILED)


def _choose_tracebacks(options: argparse.Namespace) -> None:
    for variable, is_on in (
        (FULL_TRACEBACKS, options.full_tracebacks),
        (NO_TRACEBACKS, options.no_tracebacks),
    ):
        os.environ[variable] = str(int(is_on))


def _warm_up(programs: Programs, warmups: Sequence[str]) -> None:
    for warmup in warmups:
        warm_up(programs, warmup)


def _on_stuck(options: argparse.Namespace, stop: StopSignals) -> Callable[[], None]:
    return stop.give_up if options.exit_when_stuck else lambda: None


def _warn_if_exposed(endpoint: endpoints.Endpoint, security: Security) -> None:
    if not endpoint.is_exposed:
        return
    if not security.is_any:
        _log.warning(
            "INSECURE: any client that reaches %s can run this worker's models",
            endpoint.address,
        )
    if security.is_clear_text:
        _log.warning(
            "clients' tokens and tensors reach %s in clear text: set --tls-cert and --tls-key",
            endpoint.address,
        )


def _check(options: argparse.Namespace) -> None:
    if options.targets and not (options.jax_model or options.torch_model):
        framework = framework_of(options.targets)
        setattr(options, f"{framework}_model", options.targets)
    elif options.targets:
        raise CallerError(
            f"{options.targets[0]!r} stands beside --jax-model or --torch-model: give it that flag"
            " too"
        )
    if options.jax_model and options.torch_model:
        raise CallerError(
            "--jax-model and --torch-model exclude each other: start one worker for each framework"
        )
    if not (options.jax_model or options.torch_model):
        for target in factories.like_targets(options.factory or {}):
            raise CallerError(
                f"nothing to serve: {target!r} stands after --factory, so it is an argument of the"
                " factory; put the target before --factory"
            )
        raise CallerError(
            "nothing to serve: name a model, as in `bridge_server model.py:function`, or with"
            " --jax-model or --torch-model"
        )
    if options.via_xla and not options.torch_model:
        raise CallerError(
            "--via-xla runs torch models through XLA: name one with --torch-model"
        )
    if options.port is not None and options.listen is not None:
        raise CallerError(
            f"--port {options.port} means --listen 127.0.0.1:{options.port}: remove --port or"
            " --listen"
        )
    if options.port is not None:
        options.listen = f"127.0.0.1:{options.port}"
    if options.full_tracebacks and options.no_tracebacks:
        raise CallerError(
            "--full-tracebacks and --no-tracebacks exclude each other: remove one of them"
        )


def _runtime_with_models(
    options: argparse.Namespace,
) -> tuple[Runtime, Mapping[str, Model]]:
    runtime = _runtime(options)
    models = _load(options.jax_model or options.torch_model, options.factory, runtime)
    logs.enable_loggers()
    devices.refuse_host(options.device, runtime)
    devices.make_ready(runtime)
    return runtime, models


def _print_ready(
    worker: Worker, models: Mapping[str, Model], runtime: Runtime, stdout: TextIO
) -> None:
    devices = ",".join(runtime.describe().devices)
    line = (
        f"bridge_server ready endpoint={worker.address} models={','.join(models)}"
        f" lanes=local,grpc devices={devices}"
    )
    print(line, file=stdout, flush=True)


def _drain(worker: Worker, stop: StopSignals, limit_s: float) -> bool:
    """Finish the calls under way; return whether all have finished."""
    if stop.has_given_up:
        return False
    _log.info("draining: no new work; waiting for the calls under way")
    is_drained = worker.drain(limit_s)
    if not is_drained:
        _log.warning("gave up on calls that were still running after %g s", limit_s)
    return is_drained


def _copy_of_stdout() -> TextIO:
    """Return a copy of stdout, since an imported model may replace or close the original."""
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
            f"--{framework}-model needs {needed} in the worker's environment: {error}; install it"
            f" for {sys.executable}, or start the worker with an interpreter that has it, which is"
            " python= or requirements= of spawn"
        ) from error


def _export(listen: str, sessions: Sessions) -> None:
    address = endpoints.host_and_port(listen, "--metrics", "not HOST:PORT")
    port = export(address, sessions.statistics)
    _log.info("metrics at http://%s:%d/metrics", address[0], port)


def _sessions(
    options: argparse.Namespace, runtime: Runtime, stop: StopSignals
) -> Sessions:
    return Sessions(
        runtime,
        residual_bytes=_residual_bytes(options, runtime),
        slab_bytes=options.session_slab_bytes,
        max_runs=options.max_runs,
        max_waiting=options.max_waiting,
        slow_s=options.slow_call_s,
        on_failure=stop.give_up,
    )


def _residual_bytes(options: argparse.Namespace, runtime: Runtime) -> int:
    if options.residual_bytes is not None:
        return int(options.residual_bytes)
    of_device = runtime.memory_bytes()
    return half_of_memory() if of_device is None else of_device // 2


def _load(
    texts: Sequence[str],
    arguments: Mapping[str, Any] | None,
    runtime: Runtime,
) -> Mapping[str, Model]:
    models: dict[str, Model] = {}
    for text in texts:
        target = targets.parse(text)
        if target.name in models:
            raise CallerError(
                f"two models are named {target.name!r}; write NAME={text}"
            )
        value = targets.load(target)
        if arguments is not None:
            value = factories.call(text, value, arguments)
        model = runtime.adapt(target.name, value)
        shardings = targets.shardings_beside(target)
        models[target.name] = runtime.shard(model, shardings) if shardings else model
    return models


def _security(options: argparse.Namespace, endpoint: endpoints.Endpoint) -> Security:
    _refuse_empty(options)
    token = "" if options.token_file else os.environ.get("BRIDGE_TOKEN", "").strip()
    file = Path(options.token_file) if options.token_file else None
    admitted = tokens.Tokens(file, token)
    for sentence in tokens.weaknesses(file, token):
        _log.warning("%s", sentence)
    security = Security(
        admitted,
        _certificates(options),
        reflection=not options.no_reflection,
    )
    if endpoint.is_exposed and not security.is_any and not options.insecure:
        raise CallerError(
            f"{endpoint.address} can be reached from other hosts: set --token-file (or"
            " BRIDGE_TOKEN) or --tls-cert and --tls-key, listen on a loopback address or a unix:"
            " socket, or accept the risk with --insecure"
        )
    return security


def _refuse_empty(options: argparse.Namespace) -> None:
    """Raise CallerError for an option without a file: it must not leave the worker open."""
    for name in ("token_file", "tls_cert", "tls_key", "tls_client_ca"):
        if getattr(options, name) == "":
            flag = f"--{name.replace('_', '-')}"
            raise CallerError(
                f"{flag} or its variable is empty; name a file, or leave it out"
            )


def _certificates(options: argparse.Namespace) -> Certificates | None:
    if bool(options.tls_cert) != bool(options.tls_key):
        raise CallerError("--tls-cert and --tls-key go together")
    if not options.tls_cert:
        if options.tls_client_ca:
            raise CallerError("--tls-client-ca needs --tls-cert and --tls-key")
        return None
    authority = options.tls_client_ca
    return Certificates(
        Path(options.tls_cert),
        Path(options.tls_key),
        Path(authority) if authority else None,
    )
