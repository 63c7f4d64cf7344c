"""JAX models that run operation by operation are held to the types of their trace, as torch
models are."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from bridge_server.jax_runtime import JaxRuntime
from bridge_server.runtime import Options
from bridge_wire.errors import RemoteModelError, SpecError
from tests.runtimes import Hosted, jvp, vjp, vmap

CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "shape": (lambda y: y[:1], r"float32\[1\]"),
    "dtype": (lambda y: y.astype(jnp.float16), "float16"),
    "rank": (lambda y: y[None], r"float32\[1, 3\]"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "transforms",
    [[], [vjp([0])], [jvp([0])], [vmap([0], 3)]],
    ids=["value", "vjp", "jvp", "vmap"],
)
def test_a_result_of_another_type_is_refused(
    change: str, transforms: list[Any]
) -> None:
    """A model whose result depends on Python's state is refused by name, and no memory is read."""
    alter, text = CHANGES[change]
    is_changed = False

    def moody(x: Any) -> Any:
        y = jnp.sin(x)
        return alter(y) if is_changed else y

    hosted = Hosted(JaxRuntime(Options(embedded=True, jit=False)), moody)
    x = np.ones((3, 3) if "vmap" in str(transforms) else 3, np.float32)
    others = [x] if transforms and "vmap" not in str(transforms) else []
    program = hosted.call(x[0] if x.ndim > 1 else x, transforms=transforms)
    hosted.run(program, x, *others)
    is_changed = True
    with pytest.raises(
        (SpecError, RemoteModelError)
    ) as caught:  # JAX itself refuses some
        hosted.run(program, x, *others)
    if not transforms:
        assert caught.type is SpecError and caught.match(text)


def test_a_residual_of_another_type_is_refused() -> None:
    """What a forward keeps is held to its types, too: the pullback was prepared for those."""
    size = 3

    def moody(x: Any) -> Any:
        return (jnp.sin(x[:size]) ** 2).sum()

    hosted = Hosted(JaxRuntime(Options(embedded=True, jit=False)), moody)
    x = np.ones(3, np.float32)
    program = hosted.call(x, keep=[0])
    hosted.run_keeping(program, x)
    size = 2
    with pytest.raises(SpecError, match="return the same types"):
        hosted.run_keeping(program, x)
