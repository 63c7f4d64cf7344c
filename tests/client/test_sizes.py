"""Formulas of sizes: read as the protocol has them, and as nothing else."""

import pytest

from bridge_client.sizes import formula
from bridge_wire.errors import ProtocolError

FUNCTIONS = {"max": max, "min": min}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", 3),
        ("d0", 7),
        ("2*d0 + 1", 15),
        ("d0^2 - d0*d1", 28),
        ("- floordiv(- d0, 2)", 4),
        ("mod(- d0, 4) + d0", 8),
        ("max(d1 - 4, 0)", 0),
        ("min(d0, 5)*(d1 + 1)", 20),
    ],
)
def test_a_formula_is_computed(text: str, expected: int) -> None:
    """Expressions as JAX writes them, of the sizes that have names."""
    assert formula(text, FUNCTIONS)({"d0": 7, "d1": 3}) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "d0 +",
            "d0.real",
            "__import__('os')",
            "max(d0)",
            "max(d0, d1, d2)",
            "max(a=1)",
            "d0 if d1 else 2",
            "[d0]",
        ),
        *(
            "d0 / 2",
            "'a'",
            "1.5",
            "True",
            "lambda: 0",
            "d0(1, 2)",
            "2^d0",
            "9^9^9",
            "(" * 500 + "d0",
            "1+" * 20_000,
        ),
    ],
)
def test_what_is_no_formula_is_refused(text: str) -> None:
    """Nothing but numbers, names, a few operators and four functions is read, however it is
    written."""
    with pytest.raises(ProtocolError, match="formula"):
        formula(text, FUNCTIONS)
