"""A model's exceptions as errors that cross the wire. Imports no framework."""

import contextlib
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from traceback import FrameSummary
from typing import NamedTuple

from bridge_wire import classes, trees
from bridge_wire.errors import BridgeError, OutOfMemory, RemoteModelError

_log = logging.getLogger(__name__)

_OFF = ("", "0", "false", "no", "off")
# The variable that leaves the frames of frameworks and the bridge in remote tracebacks.
FULL_TRACEBACKS = "BRIDGE_FULL_TRACEBACKS"
# The variable that keeps tracebacks, which have source lines, in the worker.
NO_TRACEBACKS = "BRIDGE_NO_TRACEBACKS"
LEAKED = (
    "the model has stored a value of an earlier trace (in an attribute, a global, a cache, or a"
    " closure such as that of a custom_vjp) and uses it in another one: pass such a value as an"
    " argument, and return it as a result; jax.checking_leaks() finds the place"
)
_NEEDS_KEY = "the model draws random numbers, but the call passes no key: "
# Remedies by a pattern of the framework's message.
_REMEDIES = {
    r"Expected all tensors to be on the same device": (
        "models run on the worker's GPU: make tensors on the device of an argument, as in"
        " torch.zeros(3, device=x.device), keep constants as buffers, or start the worker with"
        " --device cpu"
    ),
    r'collection "([^"]+)" is immutable': (
        r"the call changes the collection `\1`: pass mutable=True to RemoteJaxFunction, whose calls"
        " in training mode then return its new values; or call the model for inference, such as"
        " with train=False"
    ),
    r'needs PRNG for "([^"]+)"': (
        _NEEDS_KEY
        + r"pass rngs='\1' to RemoteJaxFunction, whose calls in training mode then pass"
        " one; or call the model for inference, such as with train=False"
    ),
    r"no `rngs` argument was provided": (
        _NEEDS_KEY
        + "make the nnx module with rngs=nnx.Rngs(...), and pass the name of its stream,"
        " such as rngs='dropout', to RemoteJaxFunction; or call .eval() on it"
    ),
    r"must pass a non-None PRNGKey": (
        _NEEDS_KEY
        + "pass rngs='default' to RemoteJaxFunction, whose calls in training mode then"
        " pass one"
    ),
    r"requires a key when running in non-deterministic mode": (
        _NEEDS_KEY
        + "pass rngs='key' to RemoteJaxFunction, whose calls in training mode then pass"
        " one as the argument `key`; or call .eval() on it"
    ),
    r"unexpected PRNG key type <class 'NoneType'>": (
        _NEEDS_KEY
        + "pass rngs= with the name of the model's argument for it, such as rngs='key',"
        " to RemoteJaxFunction, whose calls in training mode then pass one"
    ),
    r"Encountered an unexpected tracer": LEAKED,
}
_BEGIN = "Traceback (most recent call last):\n"
_QUOTED_FRAME = re.compile(r'^  File "(.+)", line (\d+), in (.+)$', re.MULTILINE)
# Remarks that frameworks add to an exception's text, about frames and decorators of their own.
_REMARKS = re.compile(
    r"\n*-{20}\n(For simplicity, JAX has removed [^\n]*\n?"
    r"|An error occurred during the runtime of your JAX program!.*)",
    re.DOTALL,
)
# Names of one class in different releases.
_XLA_ERRORS = ("JaxRuntimeError", "XlaRuntimeError")
_HERE = f"{Path(__file__).parent}{os.sep}"


@contextlib.contextmanager
def model_errors(where: str) -> Iterator[None]:
    """Raise a model's exceptions as RemoteModelError."""
    try:
        yield
    except BridgeError:
        raise
    except BaseException as error:
        if not is_models(error):
            raise
        raise remote(error, where) from error


def is_models(error: BaseException) -> bool:
    """Return whether a model has raised an exception, rather than a request to exit.

    A SystemExit is the model's: it must end the call, not the thread that has to answer.
    """
    if isinstance(error, KeyboardInterrupt):  # signals raise it in the main thread only
        return threading.current_thread() is not threading.main_thread()
    return not isinstance(error, GeneratorExit)


def remote(
    error: BaseException,
    where: str,
    remedy: str = "",
) -> BridgeError:
    """Return the error that reports a model's exception and its place to a client.

    `remedy` is added to those that are known by the exception's text.
    """
    kind = type(error)
    text = text_of(error)
    if _is_out_of_memory(error):
        return OutOfMemory(
            f"the worker has no memory left for this: {kind.__name__}: {text}\n(in {where})"
        )
    message, frames = _quoted(text) if kind.__name__ in _XLA_ERRORS else ("", [])
    message = message or f"{kind.__name__}: {text}"
    remedies = [
        match.expand(known)
        for pattern, known in _REMEDIES.items()
        if (match := re.search(pattern, text))
    ]
    remedies += [remedy] if remedy else []
    trail = _traceback_of(error, frames, message if frames else "")
    if _is_on(NO_TRACEBACKS):
        _log.debug("%s", trail)
        trail = ""
        message = message.partition(_BEGIN)[0]
    return RemoteModelError(
        "\n".join([_REMARKS.sub("\n", message).rstrip(), *remedies, f"(in {where})"]),
        remote_type=f"{kind.__module__}.{kind.__qualname__}",
        remote_traceback=trail,
    )


class _Quoted(NamedTuple):
    """An exception of a callback, which XLA quotes in the text of its own."""

    message: str  # empty if there is none
    frames: Sequence[FrameSummary]


def _quoted(text: str) -> _Quoted:
    """Return the last exception that a text quotes with its traceback."""
    quoted = text.rpartition(_BEGIN)[2] if _BEGIN in text else ""
    frames = [
        FrameSummary(file, int(line), name)
        for file, line, name in _QUOTED_FRAME.findall(quoted)
    ]
    # The frames up to the bridge's last one led to the call; those after it, to the callback.
    own = [i for i, frame in enumerate(frames) if frame.filename.startswith(_HERE)]
    frames = frames[max(own, default=-1) + 1 :]
    last = list(_QUOTED_FRAME.finditer(quoted))[-1:]
    message = "".join(quoted[match.end() :] for match in last).strip()
    # A private class, such as equinox's, says nothing to a caller.
    return _Quoted(re.sub(r"^(?:\w+\.)*_\w+: ", "", message), frames)


def _traceback_of(
    error: BaseException, quoted: Sequence[FrameSummary], message: str
) -> str:
    """Return the traceback as text; `quoted` and `message` are of an exception that it quotes.

    The frames of the bridge and of the frameworks do not help the model's author.
    """
    frames = traceback.extract_tb(error.__traceback__)
    only = "".join(traceback.format_exception_only(error))
    if is_full():
        return "".join([_BEGIN, *traceback.format_list(frames), only])
    lines = traceback.format_list(models_frames([*frames, *quoted]))
    return "".join([_BEGIN, *lines, _REMARKS.sub("\n", message or only).rstrip(), "\n"])


def is_full() -> bool:
    """Return whether remote tracebacks keep the frames of the bridge and of frameworks."""
    return _is_on(FULL_TRACEBACKS)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() not in _OFF


def places_of(error: BaseException) -> list[tuple[str, int | None]]:
    """Return the file and the line of each of the model's frames."""
    frames = models_frames(traceback.extract_tb(error.__traceback__))
    return [(frame.filename, frame.lineno) for frame in frames]


def models_frames(frames: Sequence[FrameSummary]) -> list[FrameSummary]:
    """Return the frames of the model and of libraries that it uses."""
    hidden = machinery()
    return [frame for frame in frames if not frame.filename.startswith(hidden)]


def text_of(error: BaseException) -> str:
    """Return an exception's text; a model's exception may have a `__str__` that raises."""
    try:
        return str(error)
    except Exception as another:
        return f"(its text is not available: {type(another).__name__})"


def is_refused(work: Callable[[], object]) -> bool:
    """Return whether a device refuses even little work, for another reason than memory."""
    try:
        work()
    except Exception as error:
        return not _is_out_of_memory(error)
    return False


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether a framework reports that its device, or the host for XLA, has no memory."""
    name = type(error).__name__
    if name == "OutOfMemoryError":  # torch's
        return True
    first_line = text_of(error).partition("\n")[0]
    return name in _XLA_ERRORS and "RESOURCE_EXHAUSTED" in first_line


def machinery() -> tuple[str, ...]:
    """Return the prefixes of the paths of files that belong to no model."""
    own = (_HERE, classes.__file__, trees.__file__, contextlib.__file__)
    return (*own, *homes_of("jax", "torch", "torchax"))


def homes_of(*names: str) -> list[str]:
    """Return the directories of these packages, if they are imported."""
    packages = [sys.modules.get(name) for name in names]
    files = [package.__file__ for package in packages if package is not None]
    return [f"{Path(file).parent}{os.sep}" for file in files if file]
