"""A canary call: runs a program of a worker's model, to see that the worker still computes.

Imports no framework.
"""

from bridge_client.programs import Program
from bridge_client.session import ModelInfo, Session
from bridge_wire import specs, trees
from bridge_wire.pb import bridge_pb2 as pb


def run(session: Session, timeout_s: float) -> str:
    """Run a program of the worker's first model, and return what it was.

    A model with arguments known by --warmup is called on zeros; of any other, the program runs that
    returns its parameters.

    Raises:
      CallTimeout: the worker gave no answer in time.
      BridgeError: the call failed.
    """
    model = next(iter(session.models.values()))
    program = _program(session, model)
    session.prepare(program, timeout_s)
    inputs = [session.pool.lease(spec.nbytes) for spec in program.inputs]
    for block in inputs:
        block.buffer[:] = bytes(block.nbytes)
    session.run(program, inputs, timeout_s=timeout_s)
    if not program.inputs:
        return f"returned the parameters of model {model.name!r}"
    return f"called model {model.name!r}({', '.join(map(str, program.inputs))})"


def _program(session: Session, model: ModelInfo) -> Program:
    if not model.signatures:
        request = pb.PrepareRequest(parameters=pb.Parameters(model=model.name))
        return Program(session, request, (), ())
    arrays = model.signatures[0]
    call = pb.Call(
        model=model.name,
        arguments=trees.positional(len(arrays)),
        inputs=map(specs.encode, arrays),
    )
    return session.described_call(call)
