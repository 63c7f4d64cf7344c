"""Runs of programs on NumPy arrays, and the residuals that forward runs keep."""

from collections.abc import Sequence

from bridge_client.arguments import Values
from bridge_client.numpy.memory import Array, from_blocks, place
from bridge_client.programs import Positions, Program, tag_of
from bridge_client.session import Placed, Session
from bridge_wire.errors import ResidualGone
from bridge_wire.memory.pool import Block

Arrays = Sequence[Array]


def run(program: Program, inputs: Values) -> Arrays:
    """Run a program; return its outputs as writable arrays in the session's memory."""
    placed, copied = place(program, inputs)
    return _run(program, placed, copied)


def _run(program: Program, placed: Sequence[Placed], copied: int) -> Arrays:
    session: Session = program.session
    outputs: Arrays = session.run(
        program,
        placed,
        copied=copied,
        make=lambda blocks: from_blocks(blocks, program.outputs),
    )
    return outputs


class Kept:
    """A forward run whose residual stays on the worker as long as this object lives."""

    def __init__(
        self,
        program: Program,
        wrt: Positions,
        inputs: Values,
        *,
        lasting: bool,
    ) -> None:
        """Run a program, and keep a residual for the inputs `wrt`.

        `lasting`: the caller may change the inputs before the pullback.
        """
        self._program = program
        self._wrt = wrt
        self._session: Session = program.session
        self._residual = 0
        keeping = program.keeping(wrt)
        self._placed, copied = place(keeping, inputs, lasting=lasting)

        def make(blocks: list[Block], residual: int) -> tuple[Arrays, int]:
            return from_blocks(blocks, keeping.outputs), residual

        self.outputs: Arrays
        self.outputs, self._residual = self._session.run_keeping(
            keeping, self._placed, copied=copied, make=make
        )

    def __del__(self) -> None:
        if getattr(self, "_residual", 0):
            self._session.drop_residual(self._residual)

    def pull_back(self, given: Positions, cotangents: Values) -> Arrays:
        """Return the cotangents of the inputs, from those of the outputs `given`.

        If the residual is gone, the worker computes it from the inputs once more.

        Raises:
          ModelChanged: the residual is gone, and the worker hosts another model now.
        """
        keeping = self._program.keeping(self._wrt)
        pullback = keeping.pullback(self._wrt, given)
        placed, copied = place(pullback, cotangents)
        try:
            pulled: Arrays = self._session.run_pullback(
                pullback,
                self._residual,
                placed,
                copied=copied,
                make=lambda blocks: from_blocks(blocks, pullback.outputs),
            )
        except ResidualGone:
            same = self._program.on_model(tag_of(self._residual))
            vjp = same.vjp(self._wrt, given)
            return _run(vjp, [*self._placed, *placed], copied)
        return pulled
