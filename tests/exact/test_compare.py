"""The judgement of values and exceptions, and the page, on made-up results."""

import numpy as np
import pytest

from bridge_wire.errors import BridgeError, SpecError, WorkerDied
from exact import page, summary
from exact.compare import Refusal, judge_refusal, judge_values

ONE = np.array([1.0, -2.0, 3.0], np.float32)


@pytest.mark.parametrize(
    "got",
    [
        ONE * np.float32(1.001),
        ONE.astype(np.float64),
        ONE[:2],
        ONE[:, None],
        np.array([1, np.nan, 3], np.float32),
        np.array([1, np.inf, 3], np.float32),
        np.zeros(3, np.float32),
    ],
    ids=["value", "dtype", "length", "rank", "nan", "inf", "zeros"],
)
def test_other_values_are_wrong(got: np.ndarray) -> None:
    """Each way in which an array can differ is seen."""
    assert judge_values([got], [ONE], lambda: [0.0]).status == "wrong"


def test_rounding_is_right() -> None:
    """A few eps of the largest element are rounding, and equal bits are."""
    assert judge_values([ONE], [ONE], lambda: [0.0]).status == "right"
    assert (
        judge_values([np.nextafter(ONE, np.float32(9))], [ONE], lambda: [0.0]).status
        == "right"
    )


def test_what_an_eps_of_the_inputs_moves_as_far_is_right() -> None:
    """An ill-conditioned result may differ as its inputs' rounding moves it; a discontinuous one
    may not."""
    got = ONE * np.float32(1.0001)
    assert judge_values([got], [ONE], lambda: [0.0]).status == "wrong"
    assert judge_values([got], [ONE], lambda: [1e-4]).status == "right"
    assert judge_values([got], [ONE], lambda: [1.0]).status == "wrong"


def test_the_rounding_of_a_vanishing_derivative_is_right() -> None:
    """Leaves of a few eps in both are equal where allowed; not if one of them is larger."""
    tiny, none, small = ONE * np.float32(1e-7), ONE * 0, ONE * np.float32(1e-5)
    still = lambda: [0.0]  # noqa: E731
    assert judge_values([tiny], [none], still).status == "wrong"
    assert judge_values([tiny], [none], still, vanished=16).status == "right"
    assert judge_values([ONE], [none], still, vanished=16).status == "wrong"
    assert judge_values([none], [small], still, vanished=16).status == "wrong"


def test_exceptions_without_a_type_are_faults() -> None:
    """A BridgeError is a refusal, but for the end of the worker; anything else is a fault."""
    typed = (BridgeError,)
    assert (
        judge_refusal(Refusal(SpecError("no")), None, typed, "torch").status
        == "refused"
    )
    assert (
        judge_refusal(
            Refusal(SpecError("no")), Refusal(ValueError()), typed, "torch"
        ).status
        == "as torch"
    )
    assert (
        judge_refusal(Refusal(IndexError("no")), None, typed, "torch").status
        == "untyped"
    )
    assert (
        judge_refusal(
            Refusal(WorkerDied("gone")), Refusal(ValueError()), typed, "torch"
        ).status
        == "crash"
    )


def test_known_verdicts_are_listed_with_their_reason() -> None:
    """A row of known.toml holds for its entries, checks and status only."""
    records = [
        {
            "way": "inproc",
            "case": "op/logcumsumexp/float32/plain/0",
            "checks": {"hvp": ["inherited", "x"]},
        },
        {
            "way": "inproc",
            "case": "op/logcumsumexp/float32/plain/0",
            "checks": {"value": ["wrong", "y"]},
        },
    ]
    found = summary.summarise(records, summary.Known())
    assert found["counts"]["inproc"] == {"hvp": {"listed": 1}, "value": {"wrong": 1}}
    assert [row["detail"] for row in summary.faults(found)] == ["y"]


def test_page_is_what_the_summary_generates() -> None:
    """docs/coverage.md has been written from exact/summary.json."""
    assert page.PATH.read_text() == page.page(summary.read())
