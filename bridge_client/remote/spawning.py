"""`spawn`: a worker in another environment, as a child that ends with this process."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any, Protocol

from bridge_client.remote import environments
from bridge_client.remote.connecting import check_terms
from bridge_client.remote.link import Terms
from bridge_client.remote.retrying import Policy
from bridge_client.remote.session import RemoteSession
from bridge_client.remote.sources import SourceFile
from bridge_wire.addresses import LONGEST_SOCKET_PATH
from bridge_wire.errors import CallerError, StartupTimeout, WorkerCrashed

_log = logging.getLogger(__name__)
_worker_log = logging.getLogger("bridge_client.worker")

_LAST_LINES = 30
_LAST_LINES_OF_DEATH = 5
# A worker that ends sooner is started again after a pause, which doubles each time.
_LASTING_S = 10.0
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
_STOP_S = 10.0
# Variables that name a worker's models and clients. In this process they configure this process,
# or the worker that it connects to. Each worker chooses its own allocator.
_NOT_INHERITED = frozenset(
    f"BRIDGE_{name}"
    for name in (
        *("JAX_MODEL", "TORCH_MODEL", "FACTORY", "VIA_XLA", "MESH", "WARMUP", "CONFIG"),
        *("TOKEN", "TOKEN_FILE", "TLS_CERT", "TLS_KEY", "TLS_CLIENT_CA", "ALLOCATOR"),
    )
)
# Variables by which a service manager hears from this process, and only from this one.
_OF_SERVICE = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"})

Target = str | Mapping[str, str]


class _Closable(Protocol):
    def close(self) -> None: ...


def spawn(
    jax_model: Target | None = None,
    *,
    torch_model: Target | None = None,
    source: str | None = None,
    name: str | None = None,
    python: str | os.PathLike[str] | None = None,
    requirements: Sequence[str] | None = None,
    factory: bool | Mapping[str, Any] = False,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    args: Sequence[str] = (),
    startup_timeout_s: float = 120.0,
    timeout_s: float | None = None,
    lane: str | None = None,
    require: str | None = None,
    retry_s: float = 30.0,
    retries: int = 0,
    require_revision: bool = False,
    worker_output: Callable[[str], None] | None = None,
) -> RemoteSession:
    """Start a worker with the interpreter of another environment, and return a session with it.

    The worker ends with the session or with this process, however that ends. Its log, and what its
    models print, goes to the logger `bridge_client.worker`; what is printed also goes to stderr, if
    that logger does not show it. If the worker dies, the next call starts it again, after a pause
    if it has died soon after its start.

    Args:
      jax_model: "pkg.mod:attr" or "model.py:attr", or several as {name: target}. Exactly one of it
        and torch_model.
      source: the text of a module with the model, in place of a file; it is kept in a private
        temporary file until the session is closed. The model is named by `name`, and its framework
        is that of the module's imports, or by jax_model or torch_model.
      name: the function or model in `source`.
      python: the interpreter, this process's by default; its environment must have
        torch-jax-bridge installed. Or a version, such as "3.12", of an environment that is made.
      requirements: packages, such as ["jax", "equinox"], of an environment that is made once by uv,
        with this torch-jax-bridge. By default those of the `# /// script` header of the model's
        file, if it has one and `python` is no interpreter.
      factory: whether the target is a function that returns the model, or the arguments of that
        function: values of JSON by name, such as {"urdf": "arm.urdf"}.
      env: variables on top of this process's; of these, the worker does not see those that say
        which models another one serves, and to whom, such as BRIDGE_JAX_MODEL and BRIDGE_TOKEN.
      cwd: the worker's directory, from which modules are imported.
      args: more arguments of `bridge_server`, such as ["--x64"].
      startup_timeout_s: seconds until the worker must be ready.
      worker_output: called with each line that the models print, from another thread, in place of
        stderr.
      timeout_s, lane, require, retry_s, retries, require_revision: as in `connect`.
    Raises:
      StartupTimeout: it was not ready in time; it has been killed.
      WorkerCrashed: it ended before it was ready, or uv could not make its environment; the message
        has the last lines.
    """
    check_terms(lane, require)
    terms = Terms(
        lane=lane,
        require=require,
        policy=Policy(retry_s=retry_s, retries=retries),
        require_revision=require_revision,
    )
    flag, model = _chosen(jax_model, torch_model, source, name)
    interpreter = None if python is None else os.fspath(python)
    with contextlib.ExitStack() as stack:
        held: list[_Closable] = []
        if source is not None:
            file = SourceFile(source, model)
            stack.callback(file.close)
            held.append(file)
            model = file.target
        targets = _named(model)
        recipe = environments.recipe_for(targets, requirements, interpreter, cwd)
        if recipe:
            environment = environments.environment(recipe)
            stack.callback(environment.close)
            held.append(environment)
            interpreter = environment.python
        command = [interpreter or sys.executable, "-m", "bridge_server"]
        for target in targets:
            command += [*flag, target]
        child = _Child(
            [*command, *_of_factory(factory), *args],
            dict(env or {}),
            cwd,
            startup_timeout_s,
            worker_output or _shown,
            held,
        )
        stack.callback(child.close)
        session = RemoteSession(child, terms, timeout_s)
        stack.pop_all()
    # A session that is forgotten without close() must not keep its worker until the process ends.
    weakref.finalize(session, child.terminate)
    if source is not None:
        weakref.finalize(session, file.close)
    return session


def _chosen(
    jax_model: Any, torch_model: Any, source: Any, name: Any
) -> tuple[list[str], Any]:
    """Return the flag of the model's framework, if it was given, and the model."""
    options = {
        "--jax-model": jax_model,
        "--torch-model": torch_model,
        "": name,
    }
    chosen = [(flag, model) for flag, model in options.items() if model is not None]
    if source is None and name is not None:
        raise CallerError(
            "name= names a model in source=; pass source= too, or {name: target} as jax_model= or"
            " torch_model="
        )
    if len(chosen) != 1:
        raise CallerError(
            "spawn needs either jax_model= or torch_model="
            if source is None
            else "source= needs the model's name in one of name=, jax_model= and torch_model="
        )
    ((flag, model),) = chosen
    return [flag] if flag else [], model


def _named(model: Any) -> list[str]:
    if isinstance(model, str):
        return [model]
    is_named = isinstance(model, Mapping)
    if not is_named or not all(isinstance(each, str) for each in model.values()):
        raise CallerError(
            f"the model is {model!r}, which cannot be sent to another process; expected its place,"
            " such as 'model.py:function' or 'package.module:function', or a dict from names to"
            " places"
        )
    return [f"{name}={target}" for name, target in model.items()]


def _of_factory(factory: bool | Mapping[str, Any]) -> list[str]:
    if isinstance(factory, bool):
        return ["--factory"] if factory else []
    try:
        return [f"--factory={json.dumps(dict(factory))}"]
    except (TypeError, ValueError) as error:
        raise CallerError(
            f"factory={factory!r}; expected True, or arguments of JSON by name: {error}"
        ) from error


class _Child:
    """The worker's process: started by the first call of `address`, and again after it died."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        cwd: str | os.PathLike[str] | None,
        startup_timeout_s: float,
        show: Callable[[str], None],
        held: Iterable[_Closable] = (),
    ) -> None:
        self._show = show
        self._command = command
        self._held = held
        inherited = {
            key: value
            for key, value in os.environ.items()
            if key not in _NOT_INHERITED | _OF_SERVICE
        }
        self._env = inherited | dict(env)
        self._cwd = cwd
        self._startup_timeout_s = startup_timeout_s
        self._directory = _directory_for("worker.sock.lane")
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()
        self._output: _Output | None = None
        self._is_closed = False
        self._address = ""
        self._starts = 0
        self._last_start = 0.0
        self._short_lives = 0  # in a row

    def address(self) -> str:
        if os.getpid() == self._owner and (
            self._process is None or self._process.poll() is not None
        ):
            self._pause()
            self._start()
        return self._address

    def has_ended(self) -> bool:
        if os.getpid() != self._owner or self._process is None:
            return False
        # A dead worker's sockets close a moment before the process can be reaped.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        return self._process.poll() is not None

    def account(self) -> str:
        if not self.has_ended() or self._process is None or self._output is None:
            return ""
        lines = self._output.last_lines(_LAST_LINES_OF_DEATH)
        return f"it {_ending(self._process.returncode)}; its last lines:\n  {lines}"

    def restarts(self) -> int:
        return max(0, self._starts - 1)

    def _pause(self) -> None:
        """Wait before the next start if the last workers ended soon after their starts."""
        now = time.monotonic()
        if not self._starts or now - self._last_start > _LASTING_S:
            self._short_lives = 0
        else:
            self._short_lives += 1
        if self._short_lives > 1:
            pause_s = _SHORTEST_PAUSE_S * 2.0 ** (self._short_lives - 2)
            time.sleep(min(pause_s, _LONGEST_PAUSE_S))

    def terminate(self) -> None:
        """Ask the worker to end, without waiting."""
        if (
            os.getpid() == self._owner
            and self._process is not None
            and self._process.poll() is None
        ):
            self._process.terminate()

    def close(self) -> None:
        if self._is_closed or os.getpid() != self._owner:
            return
        self._is_closed = True
        self._stop(_STOP_S)
        for each in self._held:
            each.close()
        for name in ("worker.sock", "worker.sock.lane"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._directory, name))
        with contextlib.suppress(OSError):
            os.rmdir(self._directory)

    def _start(self) -> None:
        address = f"unix:{self._directory}/worker.sock"
        if self._process is not None:
            _log.info("starting the worker again: %s", self.account())
            self._stop(0)
        self._starts += 1
        self._last_start = time.monotonic()
        process = self._process = self._popen(address)
        output = self._output = _Output(
            process, f"bridge_server ready endpoint={address} ", self._show
        )
        started = time.monotonic()
        output.wait(self._startup_timeout_s)
        if output.is_ready:
            self._address = address
            _log.debug("the worker was ready after %.1f s", time.monotonic() - started)
            return
        has_ended = output.has_ended
        if has_ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
        self._stop(0)
        if has_ended:
            raise WorkerCrashed(
                f"the worker {_ending(process.returncode)} before it was ready:"
                f"\n  {output.last_lines()}"
            )
        raise StartupTimeout(
            f"the worker was not ready within {self._startup_timeout_s:g} s and was killed; its"
            f" last lines:\n  {output.last_lines()}"
        )

    def _popen(self, address: str) -> subprocess.Popen[str]:
        try:
            return subprocess.Popen(
                [*self._command, "--listen", address, "--parent-pid", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=self._env,
                cwd=self._cwd,
                # Ctrl-C is for this process, which then shuts the worker down in order.
                start_new_session=True,
            )
        except OSError as error:
            if self._cwd is not None and not os.path.isdir(self._cwd):
                raise CallerError(
                    f"cwd={os.fspath(self._cwd)!r} is not a directory; expected the one from which"
                    " the worker imports its models"
                ) from error
            raise WorkerCrashed(
                f"the worker cannot be started: {self._command[0]}: {error.strerror}"
            ) from error

    def _stop(self, grace_s: float) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None and grace_s:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if self._output is not None:
            self._output.close()


class _Output:
    """Reads both streams of a worker into the log, and notices when the worker is ready."""

    def __init__(
        self,
        process: subprocess.Popen[str],
        ready: str,
        show: Callable[[str], None],
    ) -> None:
        self._show = show
        self._streams = process.stdout, process.stderr
        self._ready = ready
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._event = threading.Event()
        self.is_ready = False
        self._threads = [
            threading.Thread(
                target=read, args=(stream,), name="worker-log", daemon=True
            )
            for read, stream in zip(
                (self._read_stdout, self._read_stderr), self._streams, strict=True
            )
        ]
        for thread in self._threads:
            thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether the worker closed its stdout before it was ready."""
        return self._event.is_set() and not self.is_ready

    def wait(self, timeout_s: float) -> None:
        """Wait until the worker is ready or has ended."""
        self._event.wait(timeout_s)

    def last_lines(self, most: int = _LAST_LINES) -> str:
        return "\n  ".join(list(self._last_lines)[-most:]) or "(no output)"

    def close(self) -> None:
        """Close both streams once the worker has ended."""
        for thread in self._threads:
            thread.join(timeout=1.0)
        for thread, stream in zip(self._threads, self._streams, strict=True):
            # A process started by the model may hold the other end: closing would wait for it.
            if stream is not None and not thread.is_alive():
                stream.close()

    def _read_stdout(self, stream: IO[str]) -> None:
        for line in stream:
            # Not always at the line's start: a model may have printed text without a newline.
            if self._ready in line:
                self.is_ready = True
                self._event.set()
                continue
            self._note_text(line.rstrip())
        self._event.set()

    def _read_stderr(self, stream: IO[str]) -> None:
        for line in stream:
            record = _parse_log_line(line.rstrip())
            if record is None:
                self._note_text(line.rstrip())
                continue
            level, text = record
            self._last_lines.append(text)
            _worker_log.log(level, "%s", text)

    def _note_text(self, line: str) -> None:
        """Note a line that a model printed."""
        self._last_lines.append(line)
        _worker_log.info("%s", line)
        try:
            self._show(line)
        except Exception:
            _log.exception("the function for the worker's output has failed")


def _shown(line: str) -> None:
    """Print a line of the worker to stderr, unless the log shows it."""
    is_logged = _worker_log.isEnabledFor(logging.INFO) and _worker_log.hasHandlers()
    if not is_logged:
        print(f"[worker] {line}", file=sys.stderr, flush=True)


def _ending(status: int) -> str:
    """Return how a process with this status ended; negative is the number of a signal."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # a real-time signal
        name = f"signal {-status}"
    hint = ", perhaps for lack of memory" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def _directory_for(name: str) -> str:
    """Return a new directory of mode 0700 for a socket of that name."""
    directory = tempfile.mkdtemp(prefix="bridge-")
    if len(os.fsencode(os.path.join(directory, name))) <= LONGEST_SOCKET_PATH:
        return directory
    os.rmdir(directory)
    return tempfile.mkdtemp(prefix="bridge-", dir="/tmp")


def _parse_log_line(line: str) -> tuple[int, str] | None:
    """Return the level and text of a line of the worker's log, or None of any other text."""
    try:
        record = json.loads(line)
        return (
            logging.getLevelNamesMapping()[record["level"]],
            f"{record['logger']}: {record['message']}",
        )
    except (ValueError, KeyError, TypeError):
        return None
