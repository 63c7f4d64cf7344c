"""RemoteTorchFunction: signatures, parameters, random keys, and calls on several devices."""

import copy
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bridge_client.arguments import (
    NUMBERS,
    Args,
    Kwargs,
    Slot,
    Values,
    check_arguments,
    encode,
    marked_static,
    method_name,
    names_of,
    present_as,
    recipes_for,
)
from bridge_client.jax import primitives, sharding
from bridge_client.jax.memory import (
    as_array,
    bytes_of,
    dtype_of,
    from_block,
    has_x64,
    spec_of,
)
from bridge_client.jax.pytrees import (
    expand,
    flatten,
    marked,
    path_of,
    register_if_dataclass,
)
from bridge_client.programs import Program, Recent
from bridge_client.remote.connecting import session_for
from bridge_client.session import ParameterInfo, Session, as_html, checked_limit
from bridge_wire import specs, trees
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import (
    CallerError,
    DTypeError,
    RemoteModelError,
    StructureError,
)
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec
from bridge_wire.values import plain

_KEY_WORDS = 2
_KEY = Spec(BY_NAME["uint32"], (_KEY_WORDS,))
# The stream of random numbers; a model of torch has only one.
_STREAMS = ("default",)
# Of the values that a message to the worker may carry.
_MOST_BYTES = 4 << 20


_Results = tuple[Any, dict[str, Any]]  # a call's result, and the new values of buffers


class RemoteTorchFunction:
    """A torch function or module that runs in a worker process, as a differentiable JAX function.

    Call it with pytrees of arrays and Python numbers, inside or outside of jit, grad, vmap and the
    other transformations. Strings, bools, None and the arguments in `static_argnames` are static.
    Results have the model's dtypes. Where jax runs without x64, int32 arrays go to a torch model as
    int64, and its int64 results come as int32, if they fit.

    Args:
      target: a worker's address, a Session, or a torch function or module, which then runs in this
        process.
      name: one of the worker's models; needed only if it hosts several.
      method: one of the model's methods; None calls the model itself. See also `method()`.
      parameters: whose parameters a plain call uses. "worker": the worker's; they stay there.
        "client": `params` and `buffers` of this object, as in every call after either was assigned.
        `apply` always takes them as arguments.
      static_argnames: arguments whose numbers are part of the program instead of its data.
      timeout_s: seconds for each call; None takes the session's.
      example_args: positional arguments of a call, with values: see `trace_on`.
      in_specs: how the arguments are sharded over a mesh, as in `jax.shard_map`: one PartitionSpec
        for each positional argument, or one for all. Then each shard makes a call of its own, and
        nothing is gathered. Keyword arguments and parameters are the same on all shards.
      out_specs: likewise for the result.
    Raises:
      WorkerUnavailable: no worker answers.
      TargetError: the target cannot be served.
      UnknownModel: the worker hosts no such model, or several and no name was given.
      CallerError: the model has no such method.
    """

    def __init__(
        self,
        target: str | Session | Any,
        *,
        name: str | None = None,
        method: str | None = None,
        parameters: str = "worker",
        static_argnames: str | Sequence[str] = (),
        timeout_s: float | None = None,
        example_args: Args | None = None,
        in_specs: Any = None,
        out_specs: Any = None,
    ) -> None:
        if parameters not in ("client", "worker"):
            raise CallerError(
                f"parameters={parameters!r}; expected 'client' or 'worker'"
            )
        if (in_specs is None) != (out_specs is None):
            raise CallerError(
                "only one of in_specs and out_specs is given; pass both, or neither"
            )
        sharding.check_declared(in_specs, out_specs)
        self.session = session_for(target, "torch")
        self.timeout_s = checked_limit(timeout_s)
        self._model = self.session.model(name)
        self._choose(method)
        self._shared = _Shared(passes_parameters=parameters == "client")
        self._static_argnames = frozenset(names_of("static_argnames", static_argnames))
        self._in_specs = in_specs
        self._out_specs = out_specs
        self._calls: Recent[_Call] = Recent()
        # Values of arguments, by their structure and types.
        self._examples: dict[Hashable, Values] = {}
        if example_args is not None:
            self.trace_on(*example_args)

    def trace_on(self, /, *args: Any, **kwargs: Any) -> "RemoteTorchFunction":
        """Trace calls with arguments of these structures and types on these values.

        For models that cannot be traced without values, since they check them or depend on them,
        and that fail on the values that the worker makes up. Outside of jit and other
        transformations, the first call of a type is such an example itself, if the model fails on
        made-up values.

        Returns:
          This function. Only later calls are traced on the values.
        Raises:
          DTypeError, StructureError: an argument cannot be sent.
          StructureError: an argument is traced, so has no values, or the values are more than
            4 MiB.
        """
        leaves, structure, statics = self._flatten(args, kwargs)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, jax.core.Tracer):
                path = path_of((args, kwargs), i)
                raise StructureError(
                    f"the example `{path}` is traced here, and has no values; pass an array that is"
                    " made outside of jit"
                )
        if (nbytes := _nbytes(leaves)) > _MOST_BYTES:
            raise StructureError(
                f"the example has {nbytes} bytes, the limit is {_MOST_BYTES}; pass a smaller one,"
                " such as a smaller batch"
            )
        self._examples[_types_of(leaves, structure, statics)] = leaves
        self._calls.clear()
        return self

    def _choose(self, method: str | None) -> None:
        """Set the method that calls name."""
        self._method = method_name(method)
        self._arguments = self._model.arguments_of(self._method)
        # The name that jax gives to compiled code.
        self.__name__ = ".".join(filter(None, (self._model.name, self._method)))
        model = self._model
        present_as(self, model.signature_of(self._method), model.doc)

    def method(self, name: str) -> "RemoteTorchFunction":
        """Return the function that calls a method of the same model.

        It has the options, `params` and `buffers` of this function: assigned to one, they are those
        of both. `session.models[...].methods` lists the methods.

        Raises:
          CallerError: the model has no public method of this name.
        """
        methods = self._shared.methods
        methods.setdefault(self._method, self)
        key = method_name(name)
        if key not in methods:
            function = copy.copy(self)
            function._examples = {}
            function._choose(name)
            methods[key] = function
        return methods[key]

    @property
    def params(self) -> dict[str, jax.Array]:
        """The trainable parameters by their names in the model, as the worker has them, in its
        memory."""
        return self._own("params")

    @params.setter
    def params(self, values: Mapping[str, Any]) -> None:
        self._replace(values, "params")

    @property
    def buffers(self) -> dict[str, jax.Array]:
        """The model's other state, such as the statistics of a BatchNorm, by name."""
        return self._own("buffers")

    @buffers.setter
    def buffers(self, values: Mapping[str, Any]) -> None:
        self._replace(values, "buffers")

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
          ArgumentError: an argument is missing or unexpected; nothing was sent.
          DTypeError, StructureError, SpecError: an argument cannot be sent; nothing was sent.
          RemoteModelError: the model raised; with the remote traceback.
          WorkerDied: the worker died during the call; the next call reconnects.
          CallTimeout: no answer within the time allowed.
        """
        passes_parameters = self._shared.passes_parameters
        own = list(self._all().values()) if passes_parameters else None
        result, _ = self._anywhere(_CallOptions(own, None, False), args, kwargs)
        return result

    def apply(
        self,
        params: Mapping[str, Any],
        /,
        *args: Any,
        buffers: Mapping[str, Any] | None = None,
        mutable: bool = False,
        rng: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Call the model with these parameters; differentiable in them.

        Args:
          params: an array for each name in `self.params`.
          buffers: an array for each name in `self.buffers`; None takes those.
          mutable: whether to return (result, buffers), with the buffers' values after the call.
          rng: a jax key for the model's random numbers; None takes the worker's own numbers.
        Raises:
          StructureError: a name is missing or unknown. Otherwise as a plain call.
        """
        self._check_names(params, "params")
        if buffers is None:
            buffers = self.buffers
        self._check_names(buffers, "buffers")
        state = {**params, **buffers}
        infos = self._model.parameters
        own = [self._as_parameter(state[info.path], info) for info in infos]
        key = None if rng is None else _key_words(rng)
        result, new_buffers = self._anywhere(
            _CallOptions(own, key, mutable), args, kwargs
        )
        return (result, new_buffers) if mutable else result

    def __getstate__(self) -> dict[str, Any]:
        # Programs belong to this process: a copy makes its own.
        return {key: value for key, value in self.__dict__.items() if key != "_calls"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._calls = Recent()

    def __repr__(self) -> str:
        return (
            f"RemoteTorchFunction({self.__name__!r}, lane={self.session.lane!r},"
            f" memory={self.session.memory!r})"
        )

    def _repr_html_(self) -> str:
        return as_html(repr(self), [self._model], self._method)

    # Parameters -----------------------------------------------------------------------------------

    def _infos(self, kind: str) -> list[ParameterInfo]:
        """Return the model's "params" or "buffers"."""
        is_trainable = kind == "params"
        return [
            info for info in self._model.parameters if info.trainable is is_trainable
        ]

    def _own(self, kind: str) -> dict[str, jax.Array]:
        state = self._all()
        return {info.path: state[info.path] for info in self._infos(kind)}

    def _all(self) -> dict[str, jax.Array]:
        shared = self._shared
        if shared.state is None:
            program = self.session.prepare_parameters(self._model.name)
            blocks = self.session.run(program, ())
            paths = [info.path for info in self._model.parameters]
            labels = map(_label_of, paths)
            arrays = map(from_block, blocks, program.outputs, labels)
            shared.state = dict(zip(paths, arrays, strict=True))
        return shared.state

    def _replace(self, values: Mapping[str, Any], kind: str) -> None:
        self._check_names(values, kind)
        state = dict(self._all())
        for info in self._infos(kind):
            state[info.path] = self._as_parameter(values[info.path], info)
        self._shared.state = state
        self._shared.passes_parameters = True

    def _check_names(self, values: Mapping[str, Any], kind: str) -> None:
        """Raise StructureError unless there is a value for each of the "params" or "buffers"."""
        if not isinstance(values, Mapping):
            raise StructureError(
                f"{kind} is a {type(values).__qualname__}; expected a dict of arrays by name"
            )
        names = {info.path for info in self._infos(kind)}
        missing, unknown = names - set(values), set(values) - names
        problems = [f"lacks {sorted(missing)}"] if missing else []
        if unknown:
            problems.append(f"has {sorted(unknown)}, which the model does not know")
        if problems:
            raise StructureError(f"{kind} {' and '.join(problems)}")

    # Calls ----------------------------------------------------------------------------------------

    def _anywhere(
        self,
        options: "_CallOptions",
        args: Args,
        kwargs: Kwargs,
    ) -> _Results:
        """Make one call, or one per shard if specs were declared and there is a mesh."""
        leaves, structure, statics = self._flatten(args, kwargs)
        if self._in_specs is not None:
            arrays = [leaves[i] for i in _arrays_among(leaves, statics)]
            mesh = sharding.mesh_of([*arrays, *(options.own or ())])
            if mesh is not None and not sharding.is_manual(mesh):
                return self._per_shard(mesh, options, leaves, structure, statics)
        return self._call(options, leaves, structure, statics)

    def _per_shard(
        self,
        mesh: Any,
        options: "_CallOptions",
        leaves: list[Any],
        structure: Any,
        statics: frozenset[int],
    ) -> _Results:
        args, _ = jax.tree.unflatten(structure, leaves)
        declared = self._in_specs
        if not isinstance(declared, jax.sharding.PartitionSpec):
            declared = tuple(declared)
        replicated = jax.sharding.PartitionSpec()
        per_leaf = sharding.specs_of(declared, args, "in_specs")
        per_leaf += [replicated] * (len(leaves) - len(per_leaf))
        positions = _arrays_among(leaves, statics)
        axes = sharding.axes_of(per_leaf)

        def call(own: Any, key: Any, values: Values) -> _Results:
            local = list(leaves)
            for i, value in zip(positions, values, strict=True):
                local[i] = value
            if key is not None:  # each shard its own random numbers
                shard = jax.lax.axis_index(axes)
                key = key.at[-1].add(shard.astype(key.dtype))
            of_shard = _CallOptions(own, key, options.is_mutable)
            result, buffers = self._call(of_shard, local, structure, statics)
            for name, value in buffers.items():
                buffers[name] = sharding.mean_over(axes, value)
            return result, buffers

        array_specs = [per_leaf[i] for i in positions]
        arrays = sharding.spread([leaves[i] for i in positions], mesh, array_specs)
        own = options.own
        if own is not None:
            own = sharding.spread(own, mesh, [replicated] * len(own))
        in_specs = (replicated, replicated, array_specs)
        out_specs = (self._out_specs, replicated)
        sharded = sharding.per_shard(call, mesh, in_specs, out_specs)
        results: _Results = sharded(own, options.key, arrays)
        return results

    def _call(
        self,
        options: "_CallOptions",
        leaves: list[Any],
        structure: Any,
        statics: frozenset[int],
    ) -> _Results:
        passed = options.passed
        signature: list[Hashable] = [
            structure,
            options.own is None,
            options.key is None,
            options.is_mutable,
            has_x64(),
        ]
        inputs = list(passed)
        for i, leaf in enumerate(leaves):
            kind: Any = type(leaf)
            if i in statics:
                signature.append((kind, leaf if kind is not float else leaf.hex()))
                continue
            inputs.append(leaf)
            if kind in NUMBERS:
                signature.append(kind)
            else:
                signature += [leaf.dtype, leaf.shape]
        for array in passed:
            signature += [array.dtype, array.shape]
        key = tuple(signature)
        call = self._calls[key]
        if call is None:
            arguments = jax.tree.unflatten(structure, leaves)
            expected = self._model.signature_of(self._method)
            check_arguments(self._model.name, expected, arguments, rngs=())
            call = self._prepared(options, leaves, structure, statics)
            self._calls.remember(key, call)
        ordered = sharding.varying_alike([inputs[i] for i in call.order])
        outputs = primitives.run(call.program, ordered)
        count = len(outputs) - len(call.buffers)
        result = call.rebuild(outputs[:count])
        return result, dict(zip(call.buffers, outputs[count:], strict=True))

    def _flatten(
        self, args: Args, kwargs: Kwargs
    ) -> tuple[list[Any], Any, frozenset[int]]:
        """Return the leaves of a call's arguments, with data as arrays; the structure; the static
        leaves."""
        leaves, structure = flatten((args, kwargs))
        leaves = [x if isinstance(x, jax.Array) else plain(x) for x in leaves]
        if any(register_if_dataclass(type(leaf)) for leaf in leaves):
            return self._flatten(args, kwargs)  # those leaves are nodes now
        statics = {i for i, leaf in enumerate(leaves) if isinstance(leaf, bool | str)}
        if self._static_argnames:
            statics |= self._static_leaves(args, kwargs)
        for i, leaf in enumerate(leaves):
            if i in statics:
                if isinstance(leaf, jax.Array | np.ndarray):
                    raise StructureError(_not_static(path_of((args, kwargs), i), leaf))
            elif not isinstance(leaf, jax.Array) or _is_key(leaf):
                path = functools.partial(path_of, (args, kwargs), i)
                leaves[i] = self._as_leaf(leaf, path)
        return leaves, structure, frozenset(statics)

    def _as_leaf(self, leaf: Any, path: Callable[[], str]) -> Any:
        """Return a leaf as an array of jax, or as the Python number that it is."""
        is_key = _is_key(leaf)
        if isinstance(leaf, jax.Array) and not is_key:
            return leaf
        if type(leaf) is int:
            _check_integer(leaf, path)
        if type(leaf) in NUMBERS:
            return leaf
        name = path()
        is_array = hasattr(leaf, "__array__") or hasattr(leaf, "__jax_array__")
        if is_array and not is_key:
            try:
                return as_array(leaf, name)
            except DTypeError:
                raise
            except (TypeError, ValueError, RuntimeError) as error:
                raise StructureError(
                    f"`{name}` is a {type(leaf).__qualname__} that jax cannot read: {error}"
                ) from error
        raise StructureError(
            f"`{name}` is a {type(leaf).__module__}.{type(leaf).__qualname__}; expected an array, a"
            " number, bool, str or None, or a pytree of these"
            + ("; a key is passed as rng= of apply" if is_key else "")
        )

    def _as_parameter(self, value: Any, info: ParameterInfo) -> Any:
        """Return a parameter as an array of jax; a Python number takes the dtype of the model's
        parameter."""
        leaf = self._as_leaf(value, lambda: info.path)
        if type(leaf) not in NUMBERS:
            return leaf
        return jnp.asarray(leaf, dtype_of(info.spec, _label_of(info.path)))

    def _static_leaves(self, args: Args, kwargs: Kwargs) -> frozenset[int]:
        """Return the leaves of static arguments."""
        marks = marked_static(
            args, kwargs, self._arguments, self._static_argnames, marked
        )
        is_static = enumerate(jax.tree.leaves(marks))
        return frozenset(i for i, mark in is_static if mark)

    def _prepared(
        self,
        options: "_CallOptions",
        leaves: Values,
        structure: Any,
        statics: frozenset[int],
    ) -> "_Call":
        """Prepare a call; if the model fails on made-up values, on an example or these values."""
        types = _types_of(leaves, structure, statics)
        examples = self._examples.get(types)
        try:
            return self._prepare(options, leaves, structure, statics, examples)
        except RemoteModelError:
            has_values = not any(isinstance(x, jax.core.Tracer) for x in leaves)
            is_sent = has_values and _nbytes(leaves) <= _MOST_BYTES
            if examples is not None or not is_sent:
                raise
        return self._prepare(options, leaves, structure, statics, leaves)

    def _prepare(
        self,
        options: "_CallOptions",
        leaves: Values,
        structure: Any,
        statics: frozenset[int],
        examples: Values | None,
    ) -> "_Call":
        """Describe a call with a new signature, and prepare its program."""
        slotted = [leaf if i in statics else Slot(i) for i, leaf in enumerate(leaves)]
        tree = jax.tree.unflatten(structure, slotted)
        arguments, slots = encode(tree, expand=expand)
        infos = self._model.parameters
        paths = [info.path for info in infos] if options.own is not None else []
        paths += ["rng"] if options.key is not None else []
        paths += trees.argument_paths(arguments)
        passed = options.passed
        inputs = [*passed, *(leaves[i] for i in slots)]
        described = list(map(self._spec_of, inputs, paths))
        of_leaves = described[len(passed) :]
        values = [examples[i] for i in slots] if examples is not None else []
        program = self.session.prepare_call(
            pb.Call(
                model=self._model.name,
                arguments=arguments,
                inputs=map(specs.encode, described),
                parameters=options.own is not None,
                rngs=_STREAMS if options.key is not None else (),
                mutable=options.is_mutable,
                recipes=recipes_for(arguments),
                method=self._method,
                examples=map(bytes_of, values, of_leaves),
            ),
            labels=paths,
            timeout_s=self.timeout_s,
        )
        # Among the leaves that are data.
        rank = {leaf: i for i, leaf in enumerate(sorted(slots))}
        order = [*range(len(passed)), *(len(passed) + rank[leaf] for leaf in slots)]
        buffers = (
            [info.path for info in self._infos("buffers")] if options.is_mutable else []
        )
        return _Call(program, order, buffers, program.result.rebuild)

    def _spec_of(self, value: Any, path: str) -> Spec:
        if type(value) in NUMBERS:
            return NUMBERS[type(value)]
        if path == "rng":
            return _KEY
        session = self.session
        return spec_of(value.shape, value.dtype, path, session.framework, session.x64)


@dataclass(slots=True)
class _Shared:
    """The parameters of a model, and the functions that call it, by their methods."""

    passes_parameters: bool
    state: dict[str, jax.Array] | None = None
    methods: dict[str, RemoteTorchFunction] = field(default_factory=dict)


class _CallOptions(NamedTuple):
    """A call apart from its arguments: parameters, random key, and whether buffers change."""

    own: Values | None  # the parameters and buffers; None: the worker's
    key: Any  # the words of a random key, or None
    is_mutable: bool

    @property
    def passed(self) -> list[Any]:
        """The inputs before the arguments' leaves."""
        passed = list(self.own or ())
        if self.key is not None:
            passed.append(self.key)
        return passed


class _Call(NamedTuple):
    """A prepared signature: the program, the order of its inputs, and the function from its outputs
    to the result."""

    program: Program
    order: Sequence[int]
    buffers: Sequence[str]  # whose new values follow the result's leaves
    rebuild: Callable[[Values], Any]


def _types_of(leaves: Values, structure: Any, statics: frozenset[int]) -> Hashable:
    """Return the structure of a call's arguments, with the types of its data."""
    types = [
        (
            leaf if i in statics else (),
            getattr(leaf, "dtype", type(leaf)),
            np.shape(leaf),
        )
        for i, leaf in enumerate(leaves)
    ]
    return structure, *types


def _nbytes(leaves: Values) -> int:
    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    return sum(x.nbytes for x in arrays)


def _is_key(value: Any) -> bool:
    if not isinstance(value, jax.Array):
        return False
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _arrays_among(leaves: Values, statics: frozenset[int]) -> list[int]:
    """Return the positions of the arrays that are data."""
    arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    return [i for i in arrays if i not in statics]


def _label_of(path: str) -> str:
    return f"parameter `{path}`"


def _check_integer(value: int, path: Callable[[], str]) -> None:
    bits = 64 if has_x64() else 32
    limit = 2 ** (bits - 1)
    if not -limit <= value < limit:
        raise DTypeError(
            f"input `{path()}` is the integer {value}, which does not fit in {bits} bits"
        )


def _key_words(rng: Any) -> Any:
    """Return a key's words, folded to as many as are sent.

    Raises:
      StructureError: it is not a single key.
    """
    try:
        words = jax.random.key_data(rng) if _is_key(rng) else jnp.asarray(rng)
    except (TypeError, ValueError) as error:
        raise StructureError(
            f"rng is a {type(rng).__qualname__}; expected a key, as jax.random.key makes it"
        ) from error
    if words.ndim != 1 or words.dtype != jnp.uint32 or words.shape[0] % _KEY_WORDS:
        raise StructureError(
            f"rng has dtype {words.dtype} and shape {list(words.shape)}; expected one key, as"
            " jax.random.key makes it"
        )
    folded = words[:_KEY_WORDS]
    for start in range(_KEY_WORDS, words.shape[0], _KEY_WORDS):
        folded = folded ^ words[start : start + _KEY_WORDS]
    return folded


def _not_static(path: str, leaf: Any) -> str:
    if isinstance(leaf, jax.core.Tracer):
        return (
            f"`{path}` is static, but is traced here, so that its value is not known: pass a Python"
            " value, or name the argument in static_argnums or static_argnames of the"
            " surrounding jit"
        )
    return f"`{path}` is static, but is an array of shape {list(leaf.shape)}; pass a Python value"
