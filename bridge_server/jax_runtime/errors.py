"""Exceptions of models as errors that travel."""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from bridge_wire import trees
from bridge_wire.errors import BridgeError, RemoteModelError

_HERE = str(Path(__file__).parent)


@contextlib.contextmanager
def model_errors(where: str) -> Iterator[None]:
    try:
        yield
    except BridgeError:
        raise
    except Exception as error:
        raise remote(error, where) from error


def remote(error: Exception, where: str) -> RemoteModelError:
    kind = type(error)
    # The frames before the model's first one are the bridge's and jax's own and tell its author nothing.
    frames = traceback.extract_tb(error.__traceback__)
    first = next((i for i, frame in enumerate(frames) if not _is_machinery(frame.filename)), 0)
    text = "".join(["Traceback (most recent call last):\n", *traceback.format_list(frames[first:])])
    return RemoteModelError(
        f"{kind.__name__}: {error}\n(in {where})",
        remote_type=f"{kind.__module__}.{kind.__qualname__}",
        remote_traceback=text + "".join(traceback.format_exception_only(error)),
    )


def _is_machinery(filename: str) -> bool:
    return filename.startswith(_HERE) or filename in (trees.__file__, contextlib.__file__) or "/jax/" in filename
