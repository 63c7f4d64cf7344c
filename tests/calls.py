"""Calls of a session without any framework: arguments described and filled in by hand."""

import array
from collections.abc import Sequence

from bridge_client import Session
from bridge_client.programs import Program
from bridge_wire import specs, trees
from bridge_wire.dtypes import BY_NAME
from bridge_wire.memory.pool import Block
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

SCALAR = Spec(BY_NAME["float32"], ())


def floats(*shape: int) -> Spec:
    """Return the type of a float32 array."""
    return Spec(BY_NAME["float32"], shape)


def prepare(session: Session, model: str, *arguments: Spec | str) -> Program:
    """Prepare a call with these positional arguments: arrays, and static text."""
    leaf = pb.Tree(leaf=pb.Tree.Leaf())
    items = [
        leaf if isinstance(a, Spec) else pb.Tree(value=pb.Value(text=a))
        for a in arguments
    ]
    args = pb.Tree(tuple=pb.Tree.Sequence(items=items))
    described = [specs.encode(a) for a in arguments if isinstance(a, Spec)]
    tree = trees.arguments(args, pb.Tree(dict=pb.Tree.Mapping()))
    return session.prepare_call(pb.Call(model=model, arguments=tree, inputs=described))


def placed(session: Session, numbers: Sequence[float]) -> Block:
    """Return a block that holds these float32 values."""
    packed = array.array("f", numbers).tobytes()
    block = session.pool.lease(len(packed))
    block.buffer[:] = packed
    return block


def values(block: Block) -> list[float]:
    """Return the float32 values that a block holds."""
    return array.array("f", block.buffer.tobytes()).tolist()


def squares(session: Session, *numbers: float) -> list[float]:
    """Have the worker square the numbers."""
    program = prepare(session, "square", floats(len(numbers)))
    (block,) = session.run(program, [placed(session, numbers)])
    return values(block)
