"""The checks of one sample of torch's databases on one way. Imports both frameworks."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bridge_wire.errors import CallerError
from exact import subjects, torch_db
from exact.cases import WIDE, Entry, seed_of
from exact.compare import (
    ROUNDING,
    VANISHED,
    XLA_FUNCTIONS,
    Refusal,
    Verdict,
    attempt,
    judge_refusal,
    judge_values,
    one_line,
)
from exact.torch_reference import NoType, Reference, array, is_inexact
from exact.ways import Function

Answer = Callable[[Reference], Any]
CHECKS = ("value", "gradient", "jvp", "vmap", "hvp", "again")
KEY = (7, 11)
# Elements of a sample. Larger samples take seconds per check and show nothing new.
_TOO_LARGE = 1 << 18


class Checks:
    """The checks of one sample.

    Raises, also in methods:
      torch_db.Unusable: the sample cannot be passed to JAX.
    """

    def __init__(self, entry: Entry, index: int, way: Any) -> None:
        self.entry, self.way = entry, way
        self._subject = subject = subjects.subject(entry, index)
        function, state = torch_db.as_function(subject.target)
        self._batched_inputs = [torch.stack([x, x]) for x in state]
        self._rng = np.random.RandomState(seed_of(f"{entry}/{index}"))
        inputs = [*state, *subject.inputs]
        if sum(x.numel() for x in inputs) > _TOO_LARGE:
            raise torch_db.Unusable(f"the inputs have more than {_TOO_LARGE} elements")
        wrt = (
            [i for i, x in enumerate(state) if is_inexact(x)]
            if subject.is_module
            else []
        )
        if subject.is_module:  # buffers are not differentiated
            parameters = subject.target.parameters()  # type: ignore[attr-defined]
            wrt = list(range(len(list(parameters))))
        wrt += [len(state) + i for i in subject.wrt]
        self.reference = Reference(function, inputs, wrt)
        self._value = attempt(self.reference.value)
        self.is_undefined = (
            entry.database == "op" and entry.name.split(".")[0] in torch_db.UNDEFINED
        )
        # Whether the random numbers affect the result.
        self._is_drawn = not self.is_undefined and self._differs()
        self.is_random = not self.is_undefined and (
            self._is_drawn if subject.draws is None else subject.draws
        )
        if self.is_random:
            self.reference.key = KEY
            self._value = attempt(self.reference.value)
        key = jnp.array(KEY, jnp.uint32) if self.is_random else None
        self._index = index
        self._wide = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
        self.values = [jnp.asarray(array(x)) for x in inputs]
        self._call = self._made(key)

    def run(self) -> Iterator[tuple[str, Callable[[], Verdict]]]:
        """Yield each applicable check by name, as a function to call before the next one."""
        yield "value", self._check_value
        outputs = attempt(self.reference.inexact_outputs)
        if (
            not self.is_undefined
            and not isinstance(self._value, Refusal)
            and not isinstance(outputs, Refusal)
        ):
            if self.reference.inputs:
                yield "vmap", self._check_vmap
            if self.reference.wrt and outputs:
                self._draw(outputs)
                yield "gradient", self._check_gradient
                yield "jvp", self._check_jvp
                yield "hvp", self._check_hvp
        yield "again", self._check_again

    def _draw(self, outputs: list[int]) -> None:
        """Sample the cotangents and tangents for the checks of derivatives."""
        self._outputs = outputs
        self._weights = [self._noise(self._value[i]) for i in outputs]
        self._tangents = [
            self._noise(array(self.reference.inputs[i])) for i in self.reference.wrt
        ]

    def _made(self, key: Any) -> Function:
        made = attempt(
            lambda: self.way.function(self.entry, self._index, self._subject, key)
        )
        if not isinstance(made, Refusal):
            return made

        def refused(*_: Any) -> list[Any]:
            raise made.error

        return refused

    # The checks -----------------------------------------------------------------------------------

    def _check_value(self) -> Verdict:
        got = attempt(lambda: self._call(*self.values))
        verdict = self._judge(got, self._value, lambda r: r.value())
        if (
            verdict.status == "right"
            and self._is_drawn
            and self.way.is_traced
            and not self._follows_key(got)
        ):
            return Verdict("wrong", "five keys give equal results")
        return verdict

    def _follows_key(self, got: Any) -> bool:
        """Whether a random result depends on JAX's key, its only comparable property."""
        first = [np.asarray(y).tobytes() for y in got]
        for n in range(4):
            ys = self._made(jnp.array((n, n), jnp.uint32))(*self.values)
            if [np.asarray(y).tobytes() for y in ys] != first:
                return True
        return False

    def _check_vmap(self) -> Verdict:
        def batch() -> list[Tensor]:
            return [*self._batched_inputs, *subjects.batch(self.entry, self._index)]

        both = batch()
        arrays = [jnp.asarray(array(x)) for x in both]
        got = attempt(lambda: jax.vmap(self._call)(*arrays))
        want = attempt(lambda: self.reference.batched(both))
        return self._judge(got, want, None, lambda r: r.batched_by_vmap(both))

    def _check_gradient(self) -> Verdict:
        def gradient() -> Any:
            _, pullback = jax.vjp(self._restricted, *self._primals())
            return pullback(list(map(jnp.asarray, map(array, self._weights))))

        return self._compare(
            gradient, lambda r: r.gradient(self._outputs, self._weights)
        )

    def _check_jvp(self) -> Verdict:
        def jvp() -> Any:
            return jax.jvp(self._restricted, self._primals(), self._jax_tangents())[1]

        return self._compare(
            jvp,
            lambda r: r.tangents(self._outputs, self._tangents),
            lambda r: r.tangents_by_reverse_mode(self._outputs, self._tangents),
        )

    def _check_hvp(self) -> Verdict:
        weights = [jnp.conj(jnp.asarray(array(w))) for w in self._weights]

        def total(*xs: Any) -> Any:
            return sum(
                jnp.sum(jnp.real(w * y))
                for w, y in zip(weights, self._restricted(*xs), strict=True)
            )

        def hvp() -> Any:
            xs = self._primals()
            return jax.jvp(
                jax.grad(total, tuple(range(len(xs)))), xs, self._jax_tangents()
            )[1]

        return self._compare(
            hvp,
            lambda r: r.curvature(self._outputs, self._weights, self._tangents),
            lambda r: r.curvature_by_forward_mode(
                self._outputs, self._weights, self._tangents
            ),
        )

    def _check_again(self) -> Verdict:
        """Check that a second call and torch itself give equal results, without fake tensors."""
        if _get_current_dispatch_mode() is not None or detect_fake_mode() is not None:
            return Verdict("fake", "a dispatch mode is still active")
        leaves = [
            y for y in (torch.ones(2) + 1, *self._plainly()) if isinstance(y, Tensor)
        ]
        if any(isinstance(y, FakeTensor) for y in leaves):
            return Verdict("fake", "torch itself returns fake tensors")
        here = attempt(self.reference.value)
        if (
            not self.is_undefined
            and not isinstance(here, Refusal)
            and not isinstance(self._value, Refusal)
        ):
            verdict = judge_values(here, self._value, lambda: [], rounding=0)
            if verdict.status != "right":
                return Verdict(
                    "wrong", f"torch itself, called afterwards: {verdict.detail}"
                )
        return self._check_value()

    # Helpers of the checks ------------------------------------------------------------------------

    def _compare(
        self, work: Callable[[], Any], answer: Answer, other: Answer | None = None
    ) -> Verdict:
        want = attempt(lambda: answer(self.reference))
        vanished = VANISHED if self.way.is_traced else 0
        return self._judge(attempt(work), want, answer, other, vanished)

    def _judge(
        self,
        got: Any,
        want: Any,
        answer: Answer | None,
        other: Answer | None = None,
        vanished: float = 0,
    ) -> Verdict:
        # XLA runs asynchronously: errors come with the values.
        if not isinstance(got, Refusal):
            got = attempt(lambda: [np.asarray(x) for x in got])
        if (
            isinstance(got, Refusal)
            and isinstance(got.error, CallerError)
            and self._has_no_type()
        ):
            return Verdict("no type", one_line(got.error))
        if isinstance(got, Refusal):
            return judge_refusal(got, want, self.way.typed, "torch")
        if isinstance(want, Refusal):
            return Verdict(
                "beyond", f"torch: {type(want.error).__name__}: {str(want.error)[:150]}"
            )
        if self.is_undefined or (self.is_random and self.way.is_traced):
            got = [np.zeros(x.shape, x.dtype) for x in got]
            want = [np.zeros_like(x) for x in want]
        exact_eps = (
            np.finfo(self.entry.dtype).eps
            if self.entry.dtype.startswith(("float", "complex"))
            else 0
        )
        spread = functools.partial(self._spread, answer, float(exact_eps))
        rounding = XLA_FUNCTIONS if self.way.is_traced else ROUNDING
        verdict = judge_values(
            got,
            want,
            spread,
            rounding=rounding,
            is_wide=self._wide,
            vanished=vanished,
        )
        if verdict.status == "wrong" and other is not None:
            otherwise = attempt(lambda: other(self.reference))
            if not isinstance(otherwise, Refusal):
                same = judge_values(
                    got, otherwise, lambda: [], rounding=rounding, is_wide=self._wide
                )
                return (
                    Verdict("inherited", verdict.detail)
                    if same.status == "right"
                    else verdict
                )
        return verdict

    def _has_no_type(self) -> bool:
        """Whether JAX lacks the type of one of torch's results."""
        if isinstance(self._value, Refusal):
            return isinstance(self._value.error, NoType)
        leaves = self._plainly()
        known = bool(leaves) and all(isinstance(y, Tensor) for y in leaves)
        return not known or (
            not self._wide
            and any(y.dtype.name in (*WIDE, "uint64") for y in self._value)
        )

    def _spread(
        self, answer: Callable[[Reference], Any] | None, eps: float
    ) -> Sequence[Any]:
        return (
            self.reference.spread(answer, eps, np.random.RandomState(1))
            if answer
            else []
        )

    def _restricted(self, *xs: Any) -> list[Any]:
        values = list(self.values)
        for i, x in zip(self.reference.wrt, xs, strict=True):
            values[i] = x
        ys = self._call(*values)
        return [ys[i] for i in self._outputs]

    def _primals(self) -> list[Any]:
        return [self.values[i] for i in self.reference.wrt]

    def _jax_tangents(self) -> list[Any]:
        return [jnp.asarray(array(t)) for t in self._tangents]

    def _noise(self, like: np.ndarray) -> Tensor:
        z = self._rng.standard_normal(like.shape)
        if like.dtype.kind == "c":
            z = z + 1j * self._rng.standard_normal(like.shape)
        return torch.from_numpy(np.asarray(z)).to(getattr(torch, like.dtype.name))

    def _differs(self) -> bool:
        if isinstance(self._value, Refusal):
            return False
        values = []
        for seed in range(4):
            torch.manual_seed(seed)
            values.append(attempt(self.reference.value))
        if any(isinstance(value, Refusal) for value in values):
            return False
        return len({b"".join(y.tobytes() for y in value) for value in values}) > 1

    def _plainly(self) -> list[Any]:
        with torch.no_grad():
            got = attempt(
                lambda: self.reference.run(*[x.clone() for x in self.reference.inputs])
            )
        return [] if isinstance(got, Refusal) else got
