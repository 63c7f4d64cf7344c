"""A model's signatures and methods, and checks of a request before anything is traced.

Imports no framework.
"""

import inspect
import math
import reprlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from bridge_server.runtime import CALL, Method, Model, is_users
from bridge_wire import trees
from bridge_wire.dtypes import BY_NAME, NEEDS_X64, TURN_ON_X64
from bridge_wire.errors import CallerError, DTypeError, ProtocolError, SpecError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec
from bridge_wire.values import decode_value

MOST_ELEMENTS = 2**47
_KEY = Spec(BY_NAME["uint32"], (2,))
_MOST_SHOWN = 20
_MOST_RNG_STREAMS = 64
# Their classes are never the user's, even where they are not installed as packages.
_FRAMEWORKS = frozenset(
    {
        "equinox",
        "flax",
        "haiku",
        "jax",
        "keras",
        "penzai",
        "torch",
        "torchax",
        "transformers",
    }
)

_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)
_LITERALS = (bool, int, float, str, type(None))
# Names of arguments for the mode, and whether true means training.
MODE_ARGUMENTS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
    "eval": False,
}

Methods = dict[str, Method]


class Keeping(Protocol):
    """A program whose residuals serve pullbacks from outputs `differentiable` to inputs `wrt`."""

    wrt: tuple[int, ...]
    differentiable: tuple[int, ...]


class _Other:
    """The default of a parameter, where no literal denotes it."""

    def __repr__(self) -> str:
        return "..."


def positional_names(
    function: Any, *, skipped: int = 0, supplied: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the names of the positional arguments that a caller passes; none if unknown.

    The caller passes neither the first `skipped` nor those `supplied` by the bridge.
    """
    parameters = _passed(function, skipped, supplied)
    return tuple(each.name for each in parameters or () if each.kind in _POSITIONAL)


def signature_of(
    function: Any, *, skipped: int = 0, supplied: Collection[str] = ()
) -> str:
    """Return the parameters that a caller passes, as `(x, n=1)`; empty if unknown.

    Unknown for a function under a decorator that takes any arguments, since the decorator may pass
    others on; the decorators of frameworks do not.
    """
    parameters = _passed(function, skipped, supplied)
    if parameters is None or _is_decorated(function):
        return ""
    plain = [
        each.replace(annotation=each.empty, default=_default_of(each))
        for each in parameters
    ]
    return str(inspect.Signature(plain))


def _passed(
    function: Any, skipped: int, supplied: Collection[str]
) -> list[inspect.Parameter] | None:
    """Return the parameters that a caller passes; None for a callable without a signature."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[skipped:]
    except (TypeError, ValueError):
        return None
    passed: list[inspect.Parameter] = []
    is_interrupted = False  # by a supplied argument, which the bridge passes by name
    for each in parameters:
        if each.name in supplied:
            is_interrupted = bool(passed)
        elif is_interrupted and each.kind is each.POSITIONAL_OR_KEYWORD:
            passed.append(each.replace(kind=each.KEYWORD_ONLY))
        else:
            passed.append(each)
    return passed


def _is_decorated(function: Any) -> bool:
    """Return whether code of the model's author stands between the callers and the signature."""
    while hasattr(function, "__wrapped__"):
        variables = getattr(function, "__globals__", None)
        if variables is not None:
            package = str(variables.get("__name__")).partition(".")[0]
            if package not in _FRAMEWORKS:
                return True
        function = function.__wrapped__
    return False


def _default_of(parameter: inspect.Parameter) -> Any:
    default = parameter.default
    if default is parameter.empty and parameter.name in MODE_ARGUMENTS:
        return _Other()  # the bridge may pass it
    is_literal = default is parameter.empty or type(default) in _LITERALS
    return default if is_literal else _Other()


def only_method(
    function: Any,
    *,
    attribute: str = "",
    skipped: int = 0,
    supplied: Collection[str] = (),
) -> Methods:
    """Return the methods of a model that is a single function."""
    names = positional_names(function, skipped=skipped, supplied=supplied)
    signature = signature_of(function, skipped=skipped, supplied=supplied)
    return {CALL: Method(attribute, names, signature)}


def unsigned(methods: Methods, name: str) -> Methods:
    """Return the methods, of which one has an unknown signature."""
    return {**methods, name: replace(methods[name], signature="")}


def methods_of(
    target: Any, base: type = object, *, supplied: Collection[str] = ()
) -> Methods:
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
        is_plain = base is object or hasattr(target, "__wrapped__")
        function = target if is_plain else getattr(target, CALL)
        methods |= only_method(function, supplied=supplied)
    for name in sorted(names):
        if _is_public_method(cls, name):
            methods[name] = _method_of(target, name, supplied)
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


def _method_of(target: Any, name: str, supplied: Collection[str]) -> Method:
    function, skipped = getattr(target, name), 0
    if not positional_names(function):
        # A compiled method, such as of equinox.filter_jit, has its signature where it is not bound.
        function, skipped = getattr(type(target), name), 1
    (method,) = only_method(
        function, attribute=name, skipped=skipped, supplied=supplied
    ).values()
    return method


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


def input_names(model: Model, call: pb.Call) -> list[str]:
    """Return the names of a call's inputs: parameters, key, leaves of arguments."""
    own = [parameter.path for parameter in model.parameters] if call.parameters else []
    keys = ["the key"] if call.rngs else []
    return own + keys + trees.argument_paths(call.arguments)


def check_signature(
    model: Model, call: pb.Call, inputs: Sequence[Spec], *, x64: bool
) -> str:
    """Check a call and its inputs, and describe the call for later error texts.

    Raises:
      CallerError, DTypeError, SpecError: the model does not support the call.
      ProtocolError: the client violates the protocol.
    """
    model.method(call.method)
    names = input_names(model, call)
    own = names[: len(model.parameters)] if call.parameters else []
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
    _check_examples(call, inputs[len(own) + bool(call.rngs) :])
    described = _described(names[len(own) :], inputs[len(own) :], call)
    count = f" and {len(own)} parameter{'s' * (len(own) > 1)}" if own else ""
    return f"model {_called(model, call)!r} called with {described}{count}"


def _check_examples(call: pb.Call, leaves: Sequence[Spec]) -> None:
    sizes = [len(each) for each in call.examples]
    expected = [spec.nbytes for spec in leaves]
    if sizes and sizes != expected:
        raise ProtocolError(
            f"the examples of a call have {sizes} bytes; expected {expected}, the sizes of its"
            " array leaves"
        )


def _called(model: Model, call: pb.Call) -> str:
    return f"{model.name}.{call.method}" if call.method else model.name


def _described(names: Sequence[str], inputs: Sequence[Spec], call: pb.Call) -> str:
    shown = [f"{name}: {spec}" for name, spec in zip(names, inputs, strict=True)]
    for path, value in trees.argument_values(call.arguments):
        if value is not None:
            shown.append(f"{path}={reprlib.repr(value)}")
    hidden = len(shown) - _MOST_SHOWN
    more = f", and {hidden} more" if hidden > 0 else ""
    return f"({', '.join(shown[:_MOST_SHOWN])}{more})"


def arguments_of(model: Model, call: pb.Call) -> dict[str, list[int]]:
    """Return the positions of the inputs of each argument, by its name or, as `args[0]`, place."""
    args, kwargs = call.arguments.tuple.items
    places = [f"args[{i}]" for i in range(len(args.tuple.items))]
    count = len(model.arguments)
    names = [*model.arguments[: len(places)], *places[count:]]
    names += [str(decode_value(key)) for key in kwargs.dict.keys]
    positions: dict[str, list[int]] = {}
    first = (len(model.parameters) if call.parameters else 0) + bool(call.rngs)
    for name, tree in zip(names, [*args.tuple.items, *kwargs.dict.items], strict=True):
        count = len(trees.leaf_paths(tree, ""))
        positions[name] = list(range(first, first + count))
        first += count
    return positions


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
