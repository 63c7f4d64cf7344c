"""A model's exceptions as errors that cross the wire. Imports no framework."""

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from bridge_wire import classes, trees
from bridge_wire.errors import BridgeError, OutOfMemory, RemoteModelError

# Remedies by a part of the framework's message.
_REMEDIES = {
    "Expected all tensors to be on the same device": (
        "models run on the worker's GPU: make tensors on the device of an argument, as in"
        " torch.zeros(3, device=x.device), keep constants as buffers, or start the worker with"
        " --device cpu"
    ),
}
# Names of one class in different releases.
_XLA_ERRORS = ("JaxRuntimeError", "XlaRuntimeError")
_HERE = str(Path(__file__).parent)


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


def remote(error: BaseException, where: str) -> BridgeError:
    """Return the error that reports a model's exception and its place to a client."""
    kind = type(error)
    text = text_of(error)
    if _is_out_of_memory(error):
        return OutOfMemory(
            f"the worker has no memory left for this: {kind.__name__}: {text}\n(in {where})"
        )
    remedies = "".join(
        f"\n{remedy}" for part, remedy in _REMEDIES.items() if part in text
    )
    return RemoteModelError(
        f"{kind.__name__}: {text}{remedies}\n(in {where})",
        remote_type=f"{kind.__module__}.{kind.__qualname__}",
        remote_traceback=_traceback_of(error),
    )


def _traceback_of(error: BaseException) -> str:
    """Return the traceback from the model's first frame on, as text.

    The frames before belong to the bridge and the framework, and do not help the model's author.
    """
    frames = traceback.extract_tb(error.__traceback__)
    machinery = _machinery()
    are_models = [not frame.filename.startswith(machinery) for frame in frames]
    first = are_models.index(True) if any(are_models) else 0
    lines = traceback.format_list(frames[first:]) + traceback.format_exception_only(
        error
    )
    return "".join(["Traceback (most recent call last):\n", *lines])


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


def _machinery() -> tuple[str, ...]:
    """Return the prefixes of the paths of files that belong to no model."""
    frameworks = [sys.modules.get(name) for name in ("jax", "torch")]
    files = [module.__file__ for module in frameworks if module is not None]
    homes = [str(Path(file).parent) for file in files if file]
    return (_HERE, classes.__file__, trees.__file__, contextlib.__file__, *homes)
