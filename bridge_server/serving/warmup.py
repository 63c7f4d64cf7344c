"""Warm-up: compiles the signatures of --warmup before the worker reports healthy.

Imports no framework.
"""

import logging

from bridge_server.runtime import finish
from bridge_server.serving.programs import Programs
from bridge_wire import specs, trees
from bridge_wire.errors import CallerError, RemoteModelError
from bridge_wire.pb import bridge_pb2 as pb

_log = logging.getLogger(__name__)


def warm_up(programs: Programs, text: str) -> None:
    """Prepare the forward and the VJP of `[NAME=]DTYPE[SHAPE],...`, as a training client would.

    Raises:
      CallerError: the text is malformed, or the model does not take such arguments.
    """
    try:
        _warm_up(programs, text)
    except (CallerError, RemoteModelError) as error:
        if isinstance(error, RemoteModelError):
            _log.debug("%s", error.remote_traceback)
        said = " ".join(str(error.args[0]).split())
        raise CallerError(f"--warmup {text!r} fails: {said}") from error


def _warm_up(programs: Programs, text: str) -> None:
    name, _, signature = text.rpartition("=")
    if not name:
        if len(programs.models) != 1:
            raise CallerError(
                "it names no model, and several models are hosted; prefix NAME="
            )
        name = next(iter(programs.models))
    arrays = specs.parse(signature)
    call = pb.Call(model=name, arguments=trees.positional(len(arrays)))
    model = programs.models.get(name)
    parameters = model.parameters if model else ()
    call.parameters = bool(parameters)
    call.inputs.extend(
        specs.encode(spec) for spec in (*(p.spec for p in parameters), *arrays)
    )
    trainable = [i for i, parameter in enumerate(parameters) if parameter.trainable]
    floats = [
        i for i, spec in enumerate(arrays, len(parameters)) if spec.dtype.is_inexact
    ]
    _log.info("warming up %s", text)
    finish(programs.call(call))
    programs.fingerprint(call)
    for wrt in (trainable, trainable + floats) if trainable else (floats,):
        kept = pb.Call()
        kept.CopyFrom(call)
        kept.keep.inputs.extend(wrt)
        program = finish(programs.call(kept))
        outputs = [i for i, spec in enumerate(program.outputs) if spec.dtype.is_inexact]
        finish(programs.pullback(program, pb.Pullback(wrt=wrt, outputs=outputs)))
    programs.signatures[name].append(arrays)
