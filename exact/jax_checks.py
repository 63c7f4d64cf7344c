"""The checks of a JAX harness, called from torch in this process.

Imports both frameworks.
"""

import functools
import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import BridgeError
from exact.cases import WIDE, Entry
from exact.compare import (
    Refusal,
    Verdict,
    attempt,
    judge_refusal,
    judge_values,
    one_line,
)
from exact.jax_db import Case, Leaves, Unusable, case_of

Say = Callable[[dict[str, Any]], None]
# Integer views for types that numpy has only through ml_dtypes.
_BITS = {1: torch.uint8, 2: torch.int16}
_runs = iter(range(1 << 60))


def run(entry: Entry, _: int, say: Say) -> None:
    """Run an entry's checks and report each verdict."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    say({"at": [0, "reference"]})
    begun = time.monotonic()
    record: dict[str, Any] = {}
    try:
        case = case_of(entry)
        _refuse_absent_types(case)
    except Unusable as error:
        record["unusable"] = str(error)
    except Exception as error:
        record["unusable"] = f"the harness itself: {one_line(error)}"
    else:
        verdicts: dict[str, list[str]] = {}
        for name, check in _Checks(case, bits=entry.database == "jax").named().items():
            say({"at": [0, name], "so far": verdicts})
            verdict = check()
            verdicts[name] = [verdict.status, verdict.detail]
        record["checks"] = verdicts
    say({"case": f"{entry}/0", **record, "seconds": round(time.monotonic() - begun, 2)})
    if next(_runs) % 50 == 49:
        jax.clear_caches()
        gc.collect()


def _refuse_absent_types(case: Case) -> None:
    value = case.answers["value"]
    arrays = [*case.inputs, *([] if isinstance(value, Refusal) else value)]
    absent = sorted(
        {
            x.dtype.name
            for x in arrays
            if not isinstance(getattr(torch, x.dtype.name, None), torch.dtype)
        }
    )
    if absent:
        raise Unusable(f"torch has no {absent[0]}")
    wide = sorted({x.dtype.name for x in case.inputs} & set(WIDE))
    if wide and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise Unusable(f"{wide[0]} without x64")


class _Checks:
    def __init__(self, case: Case, *, bits: bool) -> None:
        self._case = case
        self._compare = _same if bits else functools.partial(judge_values, spread=list)
        self._remote = RemoteJaxFunction(case.function)
        self._inputs = list(map(_tensor, case.inputs))

    def named(self) -> dict[str, Callable[[], Verdict]]:
        """Return the applicable checks in order."""
        answers = self._case.answers
        checks = {"value": self._value, "vmap": self._vmap, "gradient": self._gradient}
        checks |= {"jvp": self._jvp, "hvp": self._hvp}
        named = {name: check for name, check in checks.items() if name in answers}
        if (
            self._case.wrt
            and not self._case.outputs
            and not isinstance(answers["value"], Refusal)
        ):
            named["no gradient"] = self._no_gradient
        return named | {"again": self._again}

    def _call(self, *args: Tensor) -> tuple[Tensor, ...]:
        return tuple(pytree.tree_leaves(self._remote(*args)))

    def _value(self) -> Verdict:
        return self._judge(lambda: self._call(*self._inputs), "value")

    def _vmap(self) -> Verdict:
        return self._judge(
            lambda: torch.func.vmap(self._call)(*map(_tensor, self._case.batch)), "vmap"
        )

    def _gradient(self) -> Verdict:
        def gradient() -> Any:
            xs = [self._inputs[i].clone().requires_grad_() for i in self._case.wrt]
            weights = list(map(_tensor, self._case.weights))
            found = torch.autograd.grad(
                self._restricted(*xs), xs, weights, allow_unused=True
            )
            return [
                torch.zeros_like(x) if g is None else g
                for x, g in zip(xs, found, strict=True)
            ]

        return self._judge(gradient, "gradient")

    def _jvp(self) -> Verdict:
        return self._judge(
            lambda: torch.func.jvp(self._restricted, *self._along())[1], "jvp"
        )

    def _hvp(self) -> Verdict:
        weights = list(map(_tensor, self._case.weights))

        def total(*xs: Tensor) -> Tensor:
            outputs = zip(weights, self._restricted(*xs), strict=True)
            parts = [(w.conj() * y).sum() for w, y in outputs]
            reals = [part.real if part.is_complex() else part for part in parts]
            return sum(reals, torch.zeros(()))

        gradient = torch.func.grad(total, argnums=tuple(range(len(self._case.wrt))))
        return self._judge(lambda: torch.func.jvp(gradient, *self._along())[1], "hvp")

    def _no_gradient(self) -> Verdict:
        """Check that results without a derivative, such as integers, require no gradient."""
        args = [
            x.clone().requires_grad_() if i in self._case.wrt else x
            for i, x in enumerate(self._inputs)
        ]
        got = attempt(lambda: self._call(*args))
        if isinstance(got, Refusal):
            return judge_refusal(got, None, (BridgeError,), "jax")
        return (
            Verdict("wrong", "a result requires a gradient")
            if any(y.requires_grad for y in got)
            else Verdict("right")
        )

    def _again(self) -> Verdict:
        """Check that a call on tensors at other addresses, after overwritten results, is equal."""

        def again() -> Any:
            for y in attempt_call():
                y.reshape(-1).view(torch.uint8).fill_(255)
            others = []
            for x in self._inputs:
                base = torch.zeros(2 * x.numel() + 1, dtype=x.dtype)[1::2].view(x.shape)
                base.copy_(x)
                others.append(base.conj_physical().conj() if x.is_complex() else base)
            found = self._call(*others)
            if not all(
                _array(a).tobytes() == _array(b).tobytes()
                for a, b in zip(self._inputs, others, strict=True)
            ):
                raise AssertionError("an argument has changed")
            return found

        def attempt_call() -> tuple[Tensor, ...]:
            return self._call(*self._inputs)

        return self._judge(again, "value")

    def _restricted(self, *xs: Tensor) -> tuple[Tensor, ...]:
        args = list(self._inputs)
        for i, x in zip(self._case.wrt, xs, strict=True):
            args[i] = x
        ys = self._call(*args)
        return tuple(ys[i] for i in self._case.outputs)

    def _along(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return tuple(self._inputs[i] for i in self._case.wrt), tuple(
            map(_tensor, self._case.tangents)
        )

    def _judge(self, work: Callable[[], Any], check: str) -> Verdict:
        got, want = attempt(work), self._case.answers[check]
        if isinstance(got, Refusal):
            return judge_refusal(got, want, (BridgeError, NotImplementedError), "jax")
        if isinstance(want, Refusal):
            return Verdict("beyond", one_line(want.error))
        return self._compare(list(map(_array, got)), want)


def _same(got: Leaves, want: Leaves) -> Verdict:
    """Require equal bits, except for the signs of zeros and the payloads of NaNs."""
    if len(got) != len(want):
        return Verdict("wrong", f"{len(got)} leaves, expected {len(want)}")
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
            seen, expected = (f"{x.dtype}{list(x.shape)}" for x in (mine, theirs))
            return Verdict("wrong", f"leaf {i} is {seen}, expected {expected}")
        if mine.tobytes() != theirs.tobytes():
            equal = (mine == theirs) | ((mine != mine) & (theirs != theirs))
            if not np.all(equal):
                where = np.unravel_index(int(np.argmin(equal)), equal.shape)
                at = list(map(int, where))
                return Verdict(
                    "wrong",
                    f"leaf {i}{at} is {mine[where]!s}, expected {theirs[where]!s}",
                )
    return Verdict("right")


def _tensor(x: np.ndarray) -> Tensor:
    x = np.array(x, order="C")  # ascontiguousarray would add a dimension to a scalar
    dtype = getattr(torch, x.dtype.name)
    if x.dtype.kind in "biufc" and not hasattr(ml_dtypes, x.dtype.name):
        return torch.from_numpy(x)
    return torch.from_numpy(
        x.view(f"i{x.dtype.itemsize}" if x.dtype.itemsize > 1 else "u1")
    ).view(dtype)


def _array(t: Tensor) -> np.ndarray:
    t = t.detach().resolve_conj().resolve_neg().contiguous()
    name = str(t.dtype).removeprefix("torch.")
    if hasattr(ml_dtypes, name):
        return t.view(_BITS[t.itemsize]).numpy().view(getattr(ml_dtypes, name))
    return t.numpy()
