"""A model's signatures and methods, and checks of a request before anything is traced.

Imports no framework.
"""

import inspect
import math
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from bridge_server.runtime import CALL, Method, Model, is_users
from bridge_wire import trees
from bridge_wire.dtypes import BY_NAME, NEEDS_X64, TURN_ON_X64
from bridge_wire.errors import CallerError, DTypeError, ProtocolError, SpecError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

MOST_ELEMENTS = 2**47
_KEY = Spec(BY_NAME["uint32"], (2,))
_MOST_SHOWN = 20
_MOST_RNG_STREAMS = 64
# Their classes are never the user's, even where they are not installed as packages.
_FRAMEWORKS = frozenset(
    {"equinox", "flax", "haiku", "jax", "keras", "penzai", "torch", "transformers"}
)

Methods = dict[str, Method]


class Keeping(Protocol):
    """A program whose residuals serve pullbacks from outputs `differentiable` to inputs `wrt`."""

    wrt: tuple[int, ...]
    differentiable: tuple[int, ...]


def positional_names(function: Any, *, skipped: int = 0) -> tuple[str, ...]:
    """Return the names of a callable's positional arguments but the first `skipped`.

    There are none without a signature.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = signature.parameters.values()
    names = tuple(each.name for each in parameters if each.kind in kinds)
    return names[skipped:]


def only_method(function: Any, *, attribute: str = "", skipped: int = 0) -> Methods:
    """Return the methods of a model that is a single function."""
    return {CALL: Method(attribute, positional_names(function, skipped=skipped))}


def methods_of(target: Any, base: type = object) -> Methods:
    """Return the public methods of an object, and the object itself if it can be called.

    Public methods are named without an underscore in the user's own classes. Names of the
    framework's `base` class are not among them, nor are methods of installed packages, such as
    `load_state_dict` and `save_pretrained`: a client must not reach these.
    """
    cls = type(target)
    names: set[str] = set()
    for each in filter(_is_own, cls.__mro__):
        names.update(vars(each))
    names.difference_update(dir(base))
    # A dataclass has its fields' defaults as attributes.
    names.difference_update(getattr(cls, "__dataclass_fields__", ()))
    methods: Methods = {}
    if callable(target):
        # A module's class may have the signature of its constructor.
        function = target if base is object else getattr(target, CALL)
        methods |= only_method(function)
    for name in sorted(names):
        if _is_public_method(cls, name):
            arguments = _arguments_of(target, name)
            methods[name] = Method(name, arguments)
    return methods


def bound_method(target: Any, bases: Iterable[Any]) -> tuple[Any, str] | None:
    """Return the object and the name of a bound method of a framework's module, else None.

    The methods of the frameworks' base classes, such as `apply`, are none of these.
    """
    owner, function = _binding_of(target)
    base = next((base for base in bases if isinstance(owner, base)), None)
    if base is None:
        return None
    name = _name_in(type(owner), function)
    is_model = name in (CALL, "forward")
    if not name or (hasattr(base, name) and not is_model):
        return None
    return owner, name


def _name_in(cls: type, function: Any) -> str:
    """Return the name of a class's function, or the empty text."""
    for name in dir(cls):
        value = inspect.getattr_static(cls, name, None)
        if value is function:
            return name
    return ""


def _is_own(cls: type) -> bool:
    module = cls.__module__
    if module.partition(".")[0] in _FRAMEWORKS:
        return False
    # A notebook's __main__ has no file.
    return module == "__main__" or is_users(module)


def _is_public_method(cls: type, name: str) -> bool:
    if name.startswith("_"):
        return False
    value = getattr(cls, name, None)
    is_function = callable(value) and not isinstance(value, type)
    descriptor = inspect.getattr_static(cls, name)
    return is_function and hasattr(descriptor, "__get__")


def _arguments_of(target: Any, name: str) -> tuple[str, ...]:
    bound = getattr(target, name)
    names = positional_names(bound)
    if names:
        return names
    # A compiled method, such as of equinox.filter_jit, has its signature where it is not bound.
    function = getattr(type(target), name)
    return positional_names(function, skipped=1)


def _binding_of(target: Any) -> tuple[Any, Any]:
    """Return a bound method's object and function: of Python, or of a framework's wrapper."""
    function = getattr(target, "__func__", None)
    if function is not None:
        owner = getattr(target, "__self__", None)
        return owner, function
    args = getattr(target, "args", None)
    keywords = getattr(target, "keywords", None)
    if type(args) is not tuple or len(args) != 1 or keywords:
        return None, None
    function = getattr(target, "func", None)
    return args[0], function


def check_pullback(
    program: Keeping, wrt: Sequence[int], outputs: Sequence[int]
) -> None:
    """Raise ProtocolError unless the program's residuals serve this pullback."""
    if not set(wrt) <= set(program.wrt) or not set(outputs) <= set(
        program.differentiable
    ):
        raise ProtocolError(
            f"a pullback from the outputs {outputs} to the inputs {wrt}, of a program whose"
            f" residuals serve {program.differentiable} to {program.wrt}"
        )


def check_signature(
    model: Model, call: pb.Call, inputs: Sequence[Spec], *, x64: bool
) -> str:
    """Check a call and its inputs, and describe the call for later error texts.

    Raises:
      CallerError, DTypeError, SpecError: the model does not support the call.
      ProtocolError: the client violates the protocol.
    """
    model.method(call.method)
    own = [parameter.path for parameter in model.parameters] if call.parameters else []
    keys = ["the key"] if call.rngs else []
    names = own + keys + trees.argument_paths(call.arguments)
    if len(names) != len(inputs):
        raise ProtocolError(
            f"a call with {len(names)} array leaves came with {len(inputs)} specs"
        )
    if not x64:
        _check_width(names, inputs)
    if call.parameters:
        _check_parameters(model, inputs)
    if call.rngs:
        _check_rng_streams(call.rngs, inputs[len(own)])
    if call.mutable:
        _check_mutable(model, call)
    if call.mode not in pb.Mode.values():
        raise ProtocolError(
            f"a call has the mode {call.mode}; expected one of {pb.Mode.keys()}"
        )
    signature = _described(names, inputs, call)
    return f"model {_called(model, call)!r} called with {signature}"


def _called(model: Model, call: pb.Call) -> str:
    return f"{model.name}.{call.method}" if call.method else model.name


def _described(names: Sequence[str], inputs: Sequence[Spec], call: pb.Call) -> str:
    shown = [f"{name}: {spec}" for name, spec in zip(names, inputs, strict=True)]
    for path, value in trees.argument_values(call.arguments):
        if value is not None:
            shown.append(f"{path}={reprlib.repr(value)}")
    hidden = len(shown) - _MOST_SHOWN
    more = f", and {hidden} more" if hidden > 0 else ""
    return f"({', '.join(shown[-_MOST_SHOWN:])}{more})"


def check_differentiable(
    transform: str, positions: Sequence[int], specs: Sequence[Spec]
) -> None:
    """Raise an error unless the positions name floats, each once."""
    for i in positions:
        if i >= len(specs):
            raise ProtocolError(f"{transform} names the array {i} of {len(specs)}")
        if not specs[i].dtype.is_inexact or specs[i].weak:
            raise SpecError(
                f"{transform} with respect to an array of type {specs[i]}; only floats have"
                " derivatives"
            )
    if len(set(positions)) != len(positions):
        raise ProtocolError(f"{transform} names an array twice: {list(positions)}")


def batched(inputs: Sequence[Spec], transform: pb.Transform.Vmap) -> tuple[Spec, ...]:
    """Return the input types of a batch for the input types of one row."""
    axes, size = transform.axes, transform.size
    if len(axes) != len(inputs):
        raise ProtocolError(f"vmap names {len(axes)} axes for {len(inputs)} inputs")
    for axis, spec in zip(axes, inputs, strict=True):
        if not -1 <= axis <= len(spec.shape) or size < 0 or (spec.weak and axis >= 0):
            raise ProtocolError(
                f"vmap over axis {axis} of an input that has {len(spec.shape)} axes without it"
            )
    mapped = [
        spec if axis < 0 else _with_axis(spec, axis, size)
        for axis, spec in zip(axes, inputs, strict=True)
    ]
    for spec in mapped:
        check_size(spec, f"vmap over {size} elements")
    return tuple(mapped)


def _with_axis(spec: Spec, axis: int, size: int) -> Spec:
    return spec._replace(shape=(*spec.shape[:axis], size, *spec.shape[axis:]))


def check_size(spec: Spec, where: str) -> None:
    """Raise an error for an array too large for any machine."""
    if math.prod(spec.shape) > MOST_ELEMENTS:
        raise SpecError(
            f"{where} makes an array of type {spec}, which no memory can hold"
        )


def _check_width(names: Iterable[str], inputs: Iterable[Spec]) -> None:
    for name, spec in zip(names, inputs, strict=True):
        if spec.dtype.name in NEEDS_X64 and not spec.weak:
            raise DTypeError(
                f"input `{name}` has dtype {spec.dtype.name}, but JAX runs without x64 there; cast"
                f" it or {TURN_ON_X64}"
            )


def _check_parameters(model: Model, inputs: Iterable[Spec]) -> None:
    for parameter, spec in zip(model.parameters, inputs, strict=False):
        if spec.shape != parameter.spec.shape:
            raise SpecError(
                f"parameter `{parameter.path}` has shape {list(spec.shape)}; "
                f"the model's has {list(parameter.spec.shape)}"
            )


def _check_rng_streams(names: Sequence[str], key: Spec) -> None:
    if len(names) > _MOST_RNG_STREAMS:
        raise ProtocolError(
            f"a call names {len(names)} random streams; the limit is {_MOST_RNG_STREAMS}"
        )
    if len(set(names)) != len(names) or not all(names):
        raise ProtocolError(
            f"the random streams {list(names)} have empty or equal names"
        )
    if key != _KEY:
        raise ProtocolError(f"the key is a {key}; expected {_KEY}")


def _check_mutable(model: Model, call: pb.Call) -> None:
    if not call.parameters:
        raise ProtocolError(
            "a call that may change the model's buffers must pass the parameters"
        )
    if all(parameter.trainable for parameter in model.parameters):
        raise CallerError(
            f"mutable=True, but the model {model.name!r} has no buffers that a call could change"
        )
