"""Advice for derivatives that JAX cannot compute: the other modes that work, found by lowering.

JAX and its libraries report a missing derivative in dozens of wordings, so the advice does not
depend on error texts.
"""

from collections.abc import Sequence
from typing import Any

import jax

from bridge_server.jax_runtime.transforms import Flat, compose
from bridge_server.jax_runtime.types import avals_of, is_inexact
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

_VALUE_ONLY = (
    "the model itself can be called: for its value alone, call it under torch.no_grad(), or with"
    " inputs that require no gradient (x.detach())"
)
_FORWARD_WORKS = (
    "forward mode works: use torch.func.jvp or jacfwd(f), or give the function a reverse rule with"
    " jax.custom_vjp"
)
_REVERSE_WORKS = (
    "reverse mode works: use jacrev(f), or jacrev(jacrev(f)) instead of hessian(f), or define the"
    " function with jax.custom_jvp"
)
_NEITHER_WORKS = (
    "neither reverse nor forward mode works: define the function with jax.custom_jvp or"
    " jax.custom_vjp"
)


def for_call(
    f: Flat,
    bound: Sequence[Any],
    inputs: tuple[Spec, ...],
    transforms: Sequence[pb.Transform],
    keep: pb.Wrt | None,
) -> str:
    """Return advice for a call that cannot be lowered; `f` is the call without its transforms.

    Empty if derivatives are not at fault: the model itself raises, or everything can be lowered.
    """
    try:
        return _advice(f, bound, inputs, transforms, keep)
    except Exception:  # must not replace the model's own error
        return ""


def _advice(
    f: Flat,
    bound: Sequence[Any],
    inputs: tuple[Spec, ...],
    transforms: Sequence[pb.Transform],
    keep: pb.Wrt | None,
) -> str:
    if not _can_be_lowered(f, bound, inputs):
        return ""
    for transform in transforms:
        transformed, extended = compose(f, bound, inputs, transform, "")
        if not _can_be_lowered(transformed, bound, extended):
            return "\n".join(_other_mode(f, bound, inputs, transform))
        f, inputs = transformed, extended
    if keep is None:
        return ""
    avals = jax.eval_shape(f, bound, *avals_of(inputs))
    outputs = [i for i, y in enumerate(avals) if is_inexact(y)]
    kept = pb.Transform(vjp=pb.Transform.Vjp(wrt=keep.inputs, outputs=outputs))
    if _works(f, bound, inputs, kept):
        return ""
    return "\n".join([_VALUE_ONLY, *_other_mode(f, bound, inputs, kept)])


def _other_mode(
    f: Flat, bound: Sequence[Any], inputs: tuple[Spec, ...], transform: pb.Transform
) -> list[str]:
    """Return the advice about the other mode, if this transform is a derivative."""
    kind = transform.WhichOneof("kind")
    if kind == "vjp":
        jvp = pb.Transform.Jvp(wrt=transform.vjp.wrt, outputs=transform.vjp.outputs)
        works = _works(f, bound, inputs, pb.Transform(jvp=jvp))
        return [_FORWARD_WORKS if works else _NEITHER_WORKS]
    if kind == "jvp":
        vjp = pb.Transform.Vjp(wrt=transform.jvp.wrt, outputs=transform.jvp.outputs)
        works = _works(f, bound, inputs, pb.Transform(vjp=vjp))
        return [_REVERSE_WORKS if works else _NEITHER_WORKS]
    return []


def _works(
    f: Flat, bound: Sequence[Any], inputs: tuple[Spec, ...], transform: pb.Transform
) -> bool:
    transformed, extended = compose(f, bound, inputs, transform, "")
    return _can_be_lowered(transformed, bound, extended)


def _can_be_lowered(f: Flat, bound: Sequence[Any], inputs: Sequence[Spec]) -> bool:
    avals = avals_of(inputs)
    try:
        # A trace alone does not refuse forward mode of custom_vjps.
        jax.jit(f).lower(bound, *avals)
    except Exception:
        return False
    return True
