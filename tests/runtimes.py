"""Models called with NumPy's arrays: of a runtime of this process, and of any session."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bridge_client.programs import Program as Derived
from bridge_client.session import ModelInfo, Session
from bridge_server.runtime import Model, Preparation, Program, Runtime
from bridge_wire import specs, trees
from bridge_wire.dtypes import BY_NAME
from bridge_wire.memory.pool import Block
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
        return Spec(
            BY_NAME[
                {int: "int64", float: "float64", complex: "complex128"}[type(value)]
            ],
            (),
            weak=True,
        )
    return Spec(BY_NAME[str(value.dtype)], value.shape)


def described(
    model: Model | ModelInfo,
    args: Sequence[Any],
    *,
    parameters: bool = False,
    tree: pb.Tree | None = None,
    rngs: Sequence[str] = (),
    mutable: bool = False,
    method: str = "",
) -> pb.Call:
    """Return a call with arguments like these; text is static.

    `tree` describes them where they are nested.
    """
    items = [
        pb.Tree(value=pb.Value(text=each)) if isinstance(each, str) else _LEAF
        for each in args
    ]
    tree = tree or pb.Tree(tuple=pb.Tree.Sequence(items=items))
    own = [parameter.spec for parameter in model.parameters] if parameters else []
    key = [Spec(BY_NAME["uint32"], (2,))] if rngs else []
    leaves = [
        each if isinstance(each, Spec) else spec_of(each)
        for each in args
        if not isinstance(each, str)
    ]
    return pb.Call(
        model=model.name,
        arguments=trees.arguments(tree, pb.Tree(dict=pb.Tree.Mapping())),
        inputs=[specs.encode(spec) for spec in (*own, *key, *leaves)],
        parameters=parameters,
        rngs=rngs,
        mutable=mutable,
        method=method,
    )


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
        """Prepare a call with arguments like these; see described."""
        call = self.described(
            *args, parameters=parameters, tree=tree, rngs=rngs, mutable=mutable
        )
        call.transforms.extend(transforms)
        if keep is not None:
            call.keep.CopyFrom(pb.Wrt(inputs=keep))
        return self.prepared(call)

    def described(self, *args: Any, **options: Any) -> pb.Call:
        """Return a call with arguments like these; see described."""
        return described(self.model, args, **options)

    def prepared(self, call: pb.Call) -> Program:
        """Prepare a call."""
        return finished(self.runtime.prepare_call(self.model, call))

    def pullback(
        self, program: Program, wrt: Sequence[int], outputs: Sequence[int] = (0,)
    ) -> Program:
        return finished(
            self.runtime.prepare_pullback(program, tuple(wrt), tuple(outputs))
        )

    def run(
        self, program: Program, *inputs: Any, residual: Any = None
    ) -> list[np.ndarray]:
        """Run a program on copies of these arrays, and return its outputs."""
        return self.run_keeping(program, *inputs, residual=residual)[0]

    def run_keeping(
        self, program: Program, *inputs: Any, residual: Any = None
    ) -> tuple[list[np.ndarray], Any]:
        """Return the outputs, and what is kept."""
        views = [
            self.view(placed(value), spec)
            for value, spec in zip(inputs, program.inputs, strict=True)
        ]
        outputs, kept = program.run(views, residual)
        return [
            self.written(y, spec)
            for y, spec in zip(outputs, program.outputs, strict=True)
        ], kept

    def view(self, array: np.ndarray, spec: Spec) -> Any:
        return self.runtime.view(array.ctypes.data, spec, array)

    def written(self, output: Any, spec: Spec) -> np.ndarray:
        """Return an output as it is written into a client's memory."""
        made = aligned(spec.nbytes).view(_numpy(spec.dtype.name)).reshape(spec.shape)
        if spec.nbytes:
            self.runtime.write(output, made.ctypes.data, spec.nbytes)
        return made


class Served:
    """One model of a session, with what `Hosted` has; a residual is its id."""

    def __init__(self, session: Session, name: str) -> None:
        self.session = session
        self.model = session.model(name)

    def call(
        self,
        *args: Any,
        transforms: Sequence[pb.Transform] = (),
        keep: Sequence[int] | None = None,
        parameters: bool = False,
        tree: pb.Tree | None = None,
        method: str = "",
    ) -> Derived:
        """Prepare a call with arguments like these; see described."""
        call = described(
            self.model, args, parameters=parameters, tree=tree, method=method
        )
        program = self.session.prepare_call(call)
        # Whatever they are: as a program that this client would derive, they are right.
        if transforms:
            call.transforms.extend(transforms)
            self.session.prepare_call(call)
        for transform in transforms:
            if transform.HasField("vjp"):
                program = program.vjp(
                    tuple(transform.vjp.wrt), tuple(transform.vjp.outputs)
                )
            elif transform.HasField("jvp"):
                program = program.jvp(
                    tuple(transform.jvp.wrt), tuple(transform.jvp.outputs)
                )
            else:
                program = program.vmap(tuple(transform.vmap.axes), transform.vmap.size)
        return program if keep is None else program.keeping(tuple(keep))

    def parameters(self) -> Derived:
        return self.session.prepare_parameters(self.model.name)

    def pullback(
        self, program: Derived, wrt: Sequence[int], outputs: Sequence[int] = (0,)
    ) -> Derived:
        return program.pullback(tuple(wrt), tuple(outputs))

    def run(
        self, program: Derived, *inputs: Any, residual: Any = None
    ) -> list[np.ndarray]:
        """Run a program on copies of these arrays, and return its outputs."""
        blocks = [
            self._block(value, spec)
            for value, spec in zip(inputs, program.inputs, strict=True)
        ]
        if residual is None:
            return self._read(program, self.session.run(program, blocks))
        return self._read(program, self.session.run_pullback(program, residual, blocks))

    def run_keeping(
        self, program: Derived, *inputs: Any
    ) -> tuple[list[np.ndarray], int]:
        """Return the outputs, and the id of what is kept."""
        blocks = [
            self._block(value, spec)
            for value, spec in zip(inputs, program.inputs, strict=True)
        ]
        made, id = self.session.run_keeping(program, blocks)
        return self._read(program, made), id

    def _block(self, value: Any, spec: Spec) -> Block:
        block = self.session.pool.lease(spec.nbytes)
        block.buffer[:] = np.asarray(value, order="C").tobytes()
        return block

    def _read(self, program: Derived, blocks: Sequence[Block]) -> list[np.ndarray]:
        return [
            np.frombuffer(bytes(block.buffer), _numpy(spec.dtype.name)).reshape(
                spec.shape
            )
            for block, spec in zip(blocks, program.outputs, strict=True)
        ]


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
