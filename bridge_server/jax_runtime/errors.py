"""What JAX refuses, with advice where JAX gives none."""

import contextlib
from collections.abc import Iterator

from bridge_server.model_errors import model_errors


@contextlib.contextmanager
def jax_errors(where: str) -> Iterator[None]:
    """Raise what a model, or JAX on its account, raises as RemoteModelError."""
    with model_errors(where):
        try:
            yield
        except TypeError as error:
            if "(jvp) to a custom_vjp" not in str(error):
                raise
            advice = f"{error} Give it a jax.custom_jvp instead, or use reverse mode: jacrev(jacrev(f)) for hessian(f)."
            raise TypeError(advice).with_traceback(error.__traceback__) from error
