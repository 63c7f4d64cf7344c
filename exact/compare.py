"""Verdicts: compares values with the reference, and exceptions with the permitted refusals.

Imports numpy, but no framework.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge_wire.errors import WorldError

# A result is right within this many eps of the leaf's largest element, since torch's vmap and
# forward mode use other kernels than a loop over rows, and XLA sums in another order.
ROUNDING = 128
# Beyond ROUNDING, a result is right if an eps of change in the inputs changes the reference about
# as much (backward stability). A change by more than DISCONTINUITY of the reference's size is a
# discontinuity, not rounding.
AMPLIFIED = 32
DISCONTINUITY = 0.02
# XLA's accuracy of float32 special functions (tanh, lgamma, erfinv) in eps, for the traced way.
XLA_FUNCTIONS = 1024

# In eps, for derivatives of the traced way: inputs have size one, so where both leaves are smaller,
# they are the rounding of a vanishing derivative. In 1 - tanh(x)**2 torch's tanh is one, and XLA's
# an eps less.
VANISHED = 16

# Inputs, cotangents and tangents are of size one, so smaller leaves are remainders of cancellation.
SMALL = 1e-4

NARROWED = {"int64": "int32", "uint64": "uint32"}


@dataclass(frozen=True)
class Refusal:
    """An exception of the framework itself."""

    error: BaseException


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check.

    status: `right`, `refused` (a typed error), `as torch` or `as jax` (the framework refuses too),
      `beyond` (a value although the framework has none), `no type` (refused: the other framework
      lacks the type), `inherited` (autograd gives another value, torch.func the same: torch
      contradicts itself), or a fault: `wrong`, `untyped` (an error that is not a refusal), `fake`
      (a fake tensor is left), `crash`, `hang`.
    """

    status: str
    detail: str = ""


FAULTS = ("wrong", "untyped", "fake", "crash", "hang")


def attempt(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        return Refusal(error)


def one_line(error: BaseException, length: int = 240) -> str:
    text = " ".join(str(error).split("\n\nRemote traceback:")[0].split())
    text = re.sub(r"(?:/[^/\s]+)+/", "", text)  # folders differ between machines
    return f"{type(error).__name__}: {text[:length]}"


def judge_refusal(
    got: Refusal, want: Any, typed: tuple[type[BaseException], ...], framework: str
) -> Verdict:
    if isinstance(want, Refusal) and type(got.error) is type(want.error):
        # Traced code raises in the caller's process.
        return Verdict(f"as {framework}", one_line(got.error))
    # A typed error, but the case has ended its worker.
    if isinstance(got.error, WorldError):
        return Verdict("crash", one_line(got.error))
    if not isinstance(got.error, typed):
        return Verdict("untyped", one_line(got.error))
    return Verdict(
        f"as {framework}" if isinstance(want, Refusal) else "refused",
        one_line(got.error),
    )


def judge_values(
    got: Sequence[Any],
    want: Sequence[np.ndarray],
    spread: Callable[[], Sequence[np.ndarray | None]],
    *,
    rounding: float = ROUNDING,
    is_wide: bool = True,
    vanished: float = 0,
) -> Verdict:
    """Compare leaves.

    spread: the change of each reference leaf under a change of the inputs by an eps; called only
      when needed.
    vanished: in eps, leaves that are smaller in both are equal.
    """
    if len(got) != len(want):
        return Verdict("wrong", f"{len(got)} leaves, expected {len(want)}")
    worst, spreads = 0.0, None
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        mine = np.asarray(mine)
        name = (
            theirs.dtype.name
            if is_wide
            else NARROWED.get(theirs.dtype.name, theirs.dtype.name)
        )
        if mine.dtype.name != name or mine.shape != theirs.shape:
            return Verdict(
                "wrong",
                f"leaf {i} is {mine.dtype}{list(mine.shape)}, expected {name}{list(theirs.shape)}",
            )
        error, limit = difference(mine, theirs)
        if isinstance(error, str):
            return Verdict("wrong", f"leaf {i}: {error}")
        is_tiny = _is_below(vanished * _eps(theirs), mine, theirs)
        if error > rounding * limit and not is_tiny:
            spreads = spread() if spreads is None else spreads
            moved = spreads[i] if i < len(spreads) else None
            size = limit / _eps(theirs)
            if (
                moved is None
                or moved > DISCONTINUITY * size
                or error > rounding * limit + AMPLIFIED * moved
            ):
                where = np.unravel_index(
                    np.argmax(np.abs(_finite(mine) - _finite(theirs))), theirs.shape
                )
                seen, expected = (np.atleast_1d(x)[where or 0] for x in (mine, theirs))
                return Verdict(
                    "wrong",
                    f"leaf {i}{list(map(int, where))} is {seen!s}, expected {expected!s}",
                )
        worst = max(worst, error / limit if limit else 0.0)
    return Verdict("right", "" if worst == 0 else f"{worst:.3g} eps")


def _is_below(size: float, *leaves: np.ndarray) -> bool:
    return all(float(np.abs(_finite(x)).max(initial=0)) < size for x in leaves)


def difference(got: np.ndarray, want: np.ndarray) -> tuple[float | str, float]:
    """Return the largest absolute difference or an error text, and the largest element's eps."""
    if not want.size:
        return 0.0, 0.0
    if want.dtype.kind in "biu":
        same = np.array_equal(got.astype(want.dtype), want)
        return (
            0.0
            if same
            else f"{got.ravel()[:6].tolist()}, expected {want.ravel()[:6].tolist()}"
        ), 0.0
    a, b = _parts(got), _parts(want)
    if not np.array_equal(np.isnan(a), np.isnan(b)) or not np.array_equal(
        _signs(a), _signs(b)
    ):
        return (
            (
                f"{got.ravel()[:6].tolist()}, expected {want.ravel()[:6].tolist()} (not finite"
                " elsewhere)"
            ),
            0.0,
        )
    a, b = _finite(a), _finite(b)
    size = max(float(np.abs(b).max()), SMALL)
    return float(np.abs(a - b).max()), size * _eps(want)


def _parts(x: np.ndarray) -> np.ndarray:
    return (
        np.stack([x.real, x.imag]).astype(np.float64)
        if x.dtype.kind == "c"
        else x.astype(np.float64)
    )


def _signs(x: np.ndarray) -> np.ndarray:
    return np.where(np.isinf(x), np.sign(x), 0)


def _finite(x: np.ndarray) -> np.ndarray:
    return np.nan_to_num(
        np.asarray(x, np.complex128 if x.dtype.kind == "c" else np.float64),
        nan=0,
        posinf=0,
        neginf=0,
    )


def _eps(x: np.ndarray) -> float:
    if x.dtype.kind in "fc":
        return float(np.finfo(x.dtype).eps)
    return {"bfloat16": 2.0**-7}.get(x.dtype.name, 2.0**-2)
