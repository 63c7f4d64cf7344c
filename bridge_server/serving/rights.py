"""Rights of a call's token: the models that its client may see and use. Imports no framework."""

from collections.abc import Iterable, Iterator

import grpc
from google.protobuf.message import DecodeError

from bridge_server.process.tokens import ANYONE, Grant
from bridge_wire.errors import ProtocolError, UnknownModel
from bridge_wire.pb import bridge_pb2 as pb

# An attribute of gRPC's context: of the objects that reach a method, it alone lives for one call.
_GRANT = "bridge_grant"


def note_grant(context: grpc.ServicerContext, grant: Grant) -> None:
    """Attach the grant of an admitted call to its context."""
    setattr(context, _GRANT, grant)


def grant_of(context: grpc.ServicerContext) -> Grant:
    """Return the grant with which a call was admitted."""
    grant: Grant = getattr(context, _GRANT, ANYONE)
    return grant


def check_models(
    request: pb.PrepareRequest, grant: Grant, hosted: Iterable[str]
) -> None:
    """Raise UnknownModel if a request names a model that the grant does not admit to.

    The error is that of a model that does not exist, and lists the admitted models only.
    """
    if grant.models is None:
        return
    visible = sorted(filter(grant.admits, hosted))
    for name in _models_in(request):
        if name not in visible:
            raise UnknownModel(
                f"no model is named {name[:100]!r} here; this worker hosts {visible} for the token"
                f" {grant.name!r}"
            )


def hide_models(numbers: pb.Statistics, grant: Grant, hosted: Iterable[str]) -> None:
    """Remove the numbers of models that the grant does not admit to."""
    if grant.models is None:
        return
    names = list(hosted)
    seen = [runs for runs in numbers.runs if grant.admits(_model_of(runs, names))]
    del numbers.runs[:]
    numbers.runs.extend(seen)


def _model_of(runs: pb.Statistics.Runs, hosted: Iterable[str]) -> str:
    """Return the model of some runs, whose label may end with a method's name."""
    matching = [name for name in hosted if f"{runs.model}.".startswith(f"{name}.")]
    return max(matching, key=len, default="")


def _models_in(request: pb.PrepareRequest) -> Iterator[str]:
    """Yield the models that a request names, also in the recipes of returned instances."""
    match request.WhichOneof("what"):
        case "parameters":
            yield request.parameters.model
        case "call":
            yield from _models_of(request.call)
        case "shapes":
            yield from _models_of(request.shapes.call)


def _models_of(call: pb.Call) -> Iterator[str]:
    yield call.model
    for recipe in call.recipes:
        try:
            yield pb.Call.FromString(recipe.call).model
        except DecodeError as error:
            raise ProtocolError("a recipe's call cannot be decoded") from error
