"""remote: a decorator that serves a function in a worker with its own environment."""

from collections.abc import Callable, Sequence
from typing import Any

from bridge_client.remote.sources import source_of
from bridge_client.remote.spawning import spawn
from bridge_client.torch.function import RemoteJaxFunction


def remote(
    *,
    requirements: Sequence[str] | None = None,
    python: str | None = None,
    static_argnames: str | Sequence[str] = (),
    **options: Any,
) -> Callable[[Callable[..., Any]], RemoteJaxFunction]:
    """Return a decorator that serves a JAX function by its source, in a worker that starts at once.

    The function imports all that it uses itself, jax above all, and closes over nothing: its source
    is sent as text. Annotations are not evaluated. The worker ends with this process, or with
    `function.session.close()`.

    Args:
      requirements, python: the worker's environment, as in `spawn`.
      static_argnames: arguments whose numbers are part of the program instead of its data.
      options: further arguments of `spawn`, such as args=["--x64"].
    Raises:
      CallerError: the function uses names from outside, has other decorators or defaults that are
        no literals, or its source cannot be read.
      WorkerCrashed, StartupTimeout: the worker did not become ready.
    """

    def decorate(function: Callable[..., Any]) -> RemoteJaxFunction:
        session = spawn(
            source=source_of(function),
            jax_model=function.__name__,
            requirements=requirements,
            python=python,
            **options,
        )
        try:
            return RemoteJaxFunction(session, static_argnames=static_argnames)
        except BaseException:
            session.close()
            raise

    return decorate
