"""Runtimes without a worker: models adapted, programs prepared and run on NumPy's memory in this process."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bridge_server.runtime import Model, Preparation, Program, Runtime
from bridge_wire import specs, trees
from bridge_wire.dtypes import BY_NAME
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

_LEAF = pb.Tree(leaf=pb.Tree.Leaf())


def vjp(wrt: Sequence[int], outputs: Sequence[int] = (0,)) -> pb.Transform:
    return pb.Transform(vjp=pb.Transform.Vjp(wrt=wrt, outputs=outputs))


def jvp(wrt: Sequence[int], outputs: Sequence[int] = (0,)) -> pb.Transform:
    return pb.Transform(jvp=pb.Transform.Jvp(wrt=wrt, outputs=outputs))


def vmap(axes: Sequence[int], size: int) -> pb.Transform:
    return pb.Transform(vmap=pb.Transform.Vmap(axes=axes, size=size))


def spec_of(value: Any) -> Spec:
    """Return the type of a NumPy array, or of a Python number."""
    if isinstance(value, int | float | complex) and not isinstance(value, np.generic):
        return Spec(BY_NAME[{int: "int64", float: "float64", complex: "complex128"}[type(value)]], (), weak=True)
    return Spec(BY_NAME[str(value.dtype)], value.shape)


class Hosted:
    """One model in a runtime of this process."""

    def __init__(self, runtime: Runtime, target: Any, name: str = "model") -> None:
        self.runtime = runtime
        self.model: Model = runtime.adapt(name, target)

    def call(
        self,
        *args: Any,
        transforms: Sequence[pb.Transform] = (),
        keep: Sequence[int] | None = None,
        parameters: bool = False,
        tree: pb.Tree | None = None,
        rngs: Sequence[str] = (),
        mutable: bool = False,
    ) -> Program:
        """Prepare a call with arguments like these; text is static. `tree` describes them where they are nested."""
        items = [pb.Tree(value=pb.Value(text=each)) if isinstance(each, str) else _LEAF for each in args]
        tree = tree or pb.Tree(tuple=pb.Tree.Sequence(items=items))
        own = [parameter.spec for parameter in self.model.parameters] if parameters else []
        key = [Spec(BY_NAME["uint32"], (2,))] if rngs else []
        leaves = [each if isinstance(each, Spec) else spec_of(each) for each in args if not isinstance(each, str)]
        call = pb.Call(
            model=self.model.name,
            arguments=trees.arguments(tree, pb.Tree(dict=pb.Tree.Mapping())),
            inputs=[specs.encode(spec) for spec in (*own, *key, *leaves)],
            parameters=parameters,
            transforms=transforms,
            keep=None if keep is None else pb.Wrt(inputs=keep),
            rngs=rngs,
            mutable=mutable,
        )
        return finished(self.runtime.prepare_call(self.model, call))

    def pullback(self, program: Program, wrt: Sequence[int], outputs: Sequence[int] = (0,)) -> Program:
        return finished(self.runtime.prepare_pullback(program, tuple(wrt), tuple(outputs)))

    def run(self, program: Program, *inputs: Any, residual: Any = None) -> list[np.ndarray]:
        """Run a program on copies of these arrays, and return its outputs."""
        return self.run_keeping(program, *inputs, residual=residual)[0]

    def run_keeping(self, program: Program, *inputs: Any, residual: Any = None) -> tuple[list[np.ndarray], Any]:
        """Return the outputs, and what is kept."""
        views = [self.view(placed(value), spec) for value, spec in zip(inputs, program.inputs, strict=True)]
        outputs, kept = program.run(views, residual)
        return [self.written(y, spec) for y, spec in zip(outputs, program.outputs, strict=True)], kept

    def view(self, array: np.ndarray, spec: Spec) -> Any:
        return self.runtime.view(array.ctypes.data, spec, array)

    def written(self, output: Any, spec: Spec) -> np.ndarray:
        """Return an output as it is written into a client's memory."""
        made = aligned(spec.nbytes).view(_numpy(spec.dtype.name)).reshape(spec.shape)
        if spec.nbytes:
            self.runtime.write(output, made.ctypes.data, spec.nbytes)
        return made


def finished(preparation: Preparation) -> Program:
    """Return the program that a preparation ends with."""
    while True:
        try:
            next(preparation)
        except StopIteration as end:
            return end.value


def placed(value: Any) -> np.ndarray:
    """Return a copy of an array, or of a number, where a block could lie."""
    array = np.asarray(value, order="C")
    made = aligned(array.nbytes).view(array.dtype).reshape(array.shape)
    made[...] = array
    return made


def aligned(nbytes: int) -> np.ndarray:
    """Return memory as a session's blocks are aligned."""
    room = np.zeros(nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + nbytes]


def _numpy(name: str) -> np.dtype:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
