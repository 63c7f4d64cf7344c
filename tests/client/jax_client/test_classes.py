"""Instances of a torch model's classes come back to it exactly, or are refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge_wire.errors import StructureError
from tests.client.jax_client.conftest import Remote


@pytest.fixture(params=["float32", "float64"])
def x(request: pytest.FixtureRequest) -> Any:
    with jax.enable_x64(request.param == "float64"):
        yield jnp.ones(3, request.param)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["at once", "jit"])
def test_classes_of_one_name_are_told_apart(
    any_lane: Remote, x: Any, wrap: Any
) -> None:
    """Two classes of the same name, module and fields are each itself in the model, whichever
    came last."""
    first, second, class_of = (
        any_lane(name) for name in ("first_state", "second_state", "class_of_state")
    )
    assert [
        float(wrap(lambda x, f=f: class_of(f(x)))(x)) for f in (first, second, first)
    ] == [
        1,
        2,
        1,
    ]
    gradient = wrap(jax.grad(lambda x: second(x).y.sum()))(x)
    np.testing.assert_array_equal(gradient, 3 * np.ones(3))


def test_a_class_of_the_caller_is_none_of_the_model(any_lane: Remote, x: Any) -> None:
    """A dataclass of the caller's with the same name and fields is another one in the model."""
    State = dataclasses.make_dataclass("State", ["x", "y"])
    any_lane("first_state")(x)
    assert float(any_lane("class_of_state")(State(x, x))) == 0


def test_attributes_that_are_no_fields_are_not_lost_in_silence(
    any_lane: Remote, x: Any
) -> None:
    """An instance with more attributes than fields can be read, and is refused where it is
    passed on."""
    state = any_lane("state_with_more")(x)
    np.testing.assert_array_equal(state.y, x)
    with pytest.raises(StructureError, match=r"\['more'\] are no fields"):
        any_lane("class_of_state")(state)


def test_a_result_of_another_class_is_refused(any_lane: Remote, x: Any) -> None:
    """A result whose class differs from that of the first call, although its fields do not, is
    refused."""
    f = any_lane("some_state")
    for values in (x, -x):
        try:
            state = f(values)
        except StructureError as error:
            assert "another structure" in str(error)
        else:
            assert float(any_lane("class_of_state")(state)) == (
                1 if values.sum() > 0 else 2
            )
