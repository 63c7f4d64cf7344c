"""Exceptions of models as errors that travel. Imports no framework."""

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from bridge_wire import classes, trees
from bridge_wire.errors import BridgeError, OutOfMemory, RemoteModelError

# What to do about it, by what a framework says.
_REMEDIES = {
    "Expected all tensors to be on the same device": (
        "models run on the worker's GPU: make tensors on the device of an argument, as in"
        " torch.zeros(3, device=x.device), keep constants as buffers, or start the worker with"
        " --device cpu"
    ),
}
_XLA_ERRORS = (
    "JaxRuntimeError",
    "XlaRuntimeError",
)  # one class, by its names in different releases
_HERE = str(Path(__file__).parent)


@contextlib.contextmanager
def model_errors(where: str) -> Iterator[None]:
    """Raise what a model raises as RemoteModelError."""
    try:
        yield
    except BridgeError:
        raise
    except BaseException as error:
        if not is_models(error):
            raise
        raise remote(error, where) from error


def is_models(error: BaseException) -> bool:
    """Whether a model has raised it, rather than whoever wants this program or a generator to end.

    A SystemExit is the model's: it must end the call, not the thread that has to answer.
    """
    if isinstance(error, KeyboardInterrupt):  # those of signals are raised in the main thread only
        return threading.current_thread() is not threading.main_thread()
    return not isinstance(error, GeneratorExit)


def remote(error: BaseException, where: str) -> BridgeError:
    """Return the error that tells a client what a model has raised, and where."""
    kind, said = type(error), text_of(error)
    if _is_out_of_memory(error):
        return OutOfMemory(
            f"the worker has no memory left for this: {kind.__name__}: {said}\n(in {where})"
        )
    # The frames before the model's first one are the bridge's and the framework's own and tell its
    # author nothing.
    frames = traceback.extract_tb(error.__traceback__)
    machinery = _machinery()
    first = next(
        (i for i, frame in enumerate(frames) if not frame.filename.startswith(machinery)), 0
    )
    text = "".join(["Traceback (most recent call last):\n", *traceback.format_list(frames[first:])])
    remedies = "".join(f"\n{remedy}" for text, remedy in _REMEDIES.items() if text in said)
    return RemoteModelError(
        f"{kind.__name__}: {said}{remedies}\n(in {where})",
        remote_type=f"{kind.__module__}.{kind.__qualname__}",
        remote_traceback=text + "".join(traceback.format_exception_only(error)),
    )


def text_of(error: BaseException) -> str:
    """Return what an exception says, if it can be had: a model's may have a `__str__` that
    raises."""
    try:
        return str(error)
    except Exception as another:
        return f"(its text cannot be had: {type(another).__name__})"


def is_refused(work: Callable[[], object]) -> bool:
    """Whether a device does not even do this little work, and not for want of memory."""
    try:
        work()
    except Exception as error:
        return not _is_out_of_memory(error)
    return False


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a framework says that its device has no room, or the host none for XLA."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    return (
        type(error).__name__ in _XLA_ERRORS
        and "RESOURCE_EXHAUSTED" in str(error).partition("\n")[0]
    )


def _machinery() -> tuple[str, ...]:
    """Return the beginnings of the paths of files that are no model's."""
    frameworks = [sys.modules.get(name) for name in ("jax", "torch")]
    homes = [
        str(Path(module.__file__).parent) for module in frameworks if module and module.__file__
    ]
    return (_HERE, classes.__file__, trees.__file__, contextlib.__file__, *homes)
