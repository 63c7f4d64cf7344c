"""RemoteTorchFunction: signatures, parameters, random keys, and calls on several devices."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bridge_client.arguments import NUMBERS, Slot, encode, marked_static, names_of
from bridge_client.jax import primitives, sharding
from bridge_client.jax.memory import as_array, dtype_of, from_block, has_x64, spec_of
from bridge_client.jax.pytrees import (
    expand,
    flatten,
    marked,
    path_of,
    rebuilder,
    register_dataclass,
    register_if_dataclass,
)
from bridge_client.programs import Program
from bridge_client.remote.connecting import session_for
from bridge_client.session import ParameterInfo, Session, checked_limit
from bridge_wire import specs, trees
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import CallerError, DTypeError, StructureError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

_KEY_WORDS = 2
_KEY = Spec(BY_NAME["uint32"], (_KEY_WORDS,))
# The stream that torch draws from; a model of torch has one only.
_STREAMS = ("default",)


class RemoteTorchFunction:
    """A torch function or module that runs in a worker process, as a differentiable JAX function.

    Call it with pytrees of arrays and Python numbers, inside or outside of jit, grad, vmap and all
    the rest; strings, bools and None are static, and so is what `static_argnames` names. Results
    have the model's dtypes. Where jax runs without x64, int32 arrays go to a torch model as int64,
    and its int64 results come as int32, if they fit.

    Args:
      target: a worker's address, a Session, or a torch function or module, which then runs in this
        process.
      name: which of the worker's models; needed only where it hosts several.
      parameters: whose parameters a plain call uses: "worker" has them stay there, "client" passes
        `params` and `buffers` of this object, as every call does once either has been assigned.
        `apply` is always given them.
      static_argnames: arguments whose numbers are part of the program instead of its data.
      timeout_s: seconds for each call; None takes the session's.
      in_specs: how the arguments are spread over a mesh, as in `jax.shard_map`: one PartitionSpec
        for each positional argument, or one for all. Then each shard makes a call of its own, and
        nothing is gathered. Keyword arguments and parameters are the same on all of them.
      out_specs: likewise for the result.
    Raises:
      WorkerUnavailable: no worker answers.
      TargetError: the target is nothing that can be served.
      UnknownModel: the worker hosts no such model, or several and no name was given.
    """

    def __init__(
        self,
        target: str | Session | Any,
        *,
        name: str | None = None,
        parameters: str = "worker",
        static_argnames: str | Sequence[str] = (),
        timeout_s: float | None = None,
        in_specs: Any = None,
        out_specs: Any = None,
    ) -> None:
        if parameters not in ("client", "worker"):
            raise CallerError(f"parameters={parameters!r}; expected 'client' or 'worker'")
        if (in_specs is None) != (out_specs is None):
            raise CallerError(
                "in_specs and out_specs come together: what is spread must be told of both sides"
            )
        sharding.check_declared(in_specs, out_specs)
        self.session = session_for(target, "torch")
        self.timeout_s = checked_limit(timeout_s)
        self._model = self.session.model(name)
        self.__name__ = self._model.name  # by which jax calls what it compiles of it
        self._passes_parameters = parameters == "client"
        self._static_argnames = frozenset(names_of("static_argnames", static_argnames))
        self._in_specs = in_specs
        self._out_specs = out_specs
        self._calls: dict[Hashable, _Call] = {}
        self._classes = trees.Classes(adopt=register_dataclass)
        self._state: dict[str, jax.Array] | None = None

    @property
    def params(self) -> dict[str, jax.Array]:
        """The trainable parameters by their names in the model, as the worker has them; they
        live in its memory."""
        return self._own(lambda info: info.trainable)

    @params.setter
    def params(self, values: Mapping[str, Any]) -> None:
        self._replace(values, lambda info: info.trainable, "params")

    @property
    def buffers(self) -> dict[str, jax.Array]:
        """What the model keeps besides its parameters, such as the statistics of a BatchNorm, by
        name."""
        return self._own(lambda info: not info.trainable)

    @buffers.setter
    def buffers(self, values: Mapping[str, Any]) -> None:
        self._replace(values, lambda info: not info.trainable, "buffers")

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
          DTypeError, StructureError, SpecError: an argument cannot be sent; nothing was.
          RemoteModelError: the model raised; with the remote traceback.
          WorkerDied: the worker died during the call; the next one reconnects.
          CallTimeout: no answer within the time allowed.
        """
        own = (
            [self._all()[info.path] for info in self._model.parameters]
            if self._passes_parameters
            else None
        )
        return self._anywhere(_Way(own, None, False), args, kwargs)[0]

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
          mutable: whether to return (result, new buffers), as the call has left them.
          rng: a jax key, from which the model's random numbers follow; None leaves them to the
            worker.
        Raises:
          StructureError: a name is missing or unknown. Otherwise as a plain call.
        """
        _check_names(
            params, [info.path for info in self._model.parameters if info.trainable], "params"
        )
        state = dict(params)
        if buffers is None:
            buffers = self.buffers
        _check_names(
            buffers, [info.path for info in self._model.parameters if not info.trainable], "buffers"
        )
        state.update(buffers)
        own = [self._as_parameter(state[info.path], info) for info in self._model.parameters]
        key = None if rng is None else _key_words(rng)
        result, changed = self._anywhere(_Way(own, key, mutable), args, kwargs)
        return (result, changed) if mutable else result

    def __getstate__(self) -> dict[str, Any]:
        # Programs and classes belong to this process: a copy makes its own.
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_calls", "_classes")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._calls = {}
        self._classes = trees.Classes(adopt=register_dataclass)

    def __repr__(self) -> str:
        return (
            f"RemoteTorchFunction({self._model.name!r}, lane={self.session.lane!r},"
            f" memory={self.session.memory!r})"
        )

    # Parameters -----------------------------------------------------------------------------------

    def _own(self, is_wanted: Callable[[ParameterInfo], bool]) -> dict[str, jax.Array]:
        state = self._all()
        return {info.path: state[info.path] for info in self._model.parameters if is_wanted(info)}

    def _all(self) -> dict[str, jax.Array]:
        if self._state is None:
            program = self.session.prepare_parameters(self._model.name)
            blocks = self.session.run(program, ())
            infos = self._model.parameters
            self._state = {
                info.path: from_block(block, spec, f"parameter `{info.path}`")
                for info, block, spec in zip(infos, blocks, program.outputs, strict=True)
            }
        return self._state

    def _replace(
        self, values: Mapping[str, Any], is_wanted: Callable[[ParameterInfo], bool], what: str
    ) -> None:
        wanted = [info for info in self._model.parameters if is_wanted(info)]
        _check_names(values, [info.path for info in wanted], what)
        self._state = {
            **self._all(),
            **{info.path: self._as_parameter(values[info.path], info) for info in wanted},
        }
        self._passes_parameters = True

    # Calls ----------------------------------------------------------------------------------------

    def _anywhere(
        self, way: "_Way", args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Call as one, or once per shard where specs were declared and there is a mesh."""
        leaves, structure, statics = self._flatten(args, kwargs)
        if self._in_specs is not None:
            arrays = [
                leaf
                for i, leaf in enumerate(leaves)
                if i not in statics and isinstance(leaf, jax.Array)
            ]
            mesh = sharding.mesh_of([*arrays, *(way.own or ())])
            if mesh is not None and not sharding.is_manual(mesh):
                return self._per_shard(mesh, way, leaves, structure, statics)
        return self._call(way, leaves, structure, statics)

    def _per_shard(
        self, mesh: Any, way: "_Way", leaves: list[Any], structure: Any, statics: frozenset[int]
    ) -> tuple[Any, dict[str, Any]]:
        args, _ = jax.tree.unflatten(structure, leaves)
        declared = self._in_specs
        if not isinstance(declared, jax.sharding.PartitionSpec):
            declared = tuple(declared)
        replicated = jax.sharding.PartitionSpec()
        per_leaf = sharding.specs_of(declared, args, "in_specs")
        per_leaf += [replicated] * (len(leaves) - len(per_leaf))
        traced = [
            i for i, leaf in enumerate(leaves) if i not in statics and isinstance(leaf, jax.Array)
        ]
        axes = sharding.axes_of(per_leaf)

        def call(own: Any, key: Any, values: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
            local = list(leaves)
            for i, value in zip(traced, values, strict=True):
                local[i] = value
            if key is not None:  # each shard its own numbers
                key = key.at[-1].add(jax.lax.axis_index(axes).astype(key.dtype))
            result, changed = self._call(_Way(own, key, way.is_mutable), local, structure, statics)
            return result, {
                name: sharding.mean_over(axes, value) for name, value in changed.items()
            }

        specs = [per_leaf[i] for i in traced]
        in_specs, out_specs = (replicated, replicated, specs), (self._out_specs, replicated)
        own, arrays = way.own, sharding.spread([leaves[i] for i in traced], mesh, specs)
        if own is not None:
            own = sharding.spread(own, mesh, [replicated] * len(own))
        return sharding.per_shard(call, mesh, in_specs, out_specs)(own, way.key, arrays)

    def _call(
        self, way: "_Way", leaves: list[Any], structure: Any, statics: frozenset[int]
    ) -> tuple[Any, dict[str, Any]]:
        passed = way.passed
        signature: list[Hashable] = [
            structure,
            way.own is None,
            way.key is None,
            way.is_mutable,
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
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = self._prepare(way, leaves, structure, statics)
        made = primitives.run(call.program, sharding.varying_alike([inputs[i] for i in call.order]))
        result = call.rebuild(made[: call.result_leaves])
        return result, dict(zip(call.changed, made[call.result_leaves :], strict=True))

    def _flatten(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], Any, frozenset[int]]:
        """Return the leaves of a call's arguments, those that are data as arrays, and which of
        them are static."""
        leaves, structure = flatten((args, kwargs))
        if any(register_if_dataclass(type(leaf)) for leaf in leaves):
            return self._flatten(args, kwargs)  # those leaves have become nodes
        statics = {i for i, leaf in enumerate(leaves) if isinstance(leaf, bool | str)}
        if self._static_argnames:
            statics |= self._static_leaves(args, kwargs)
        for i, leaf in enumerate(leaves):
            if i in statics:
                if isinstance(leaf, jax.Array | np.ndarray):
                    raise StructureError(_not_static(path_of((args, kwargs), i), leaf))
            elif not isinstance(leaf, jax.Array) or type(leaf) in NUMBERS or _is_key(leaf):
                leaves[i] = self._as_leaf(leaf, lambda i=i: path_of((args, kwargs), i))  # type: ignore[misc]
        return leaves, structure, frozenset(statics)

    def _as_leaf(self, leaf: Any, path: str | Callable[[], str]) -> Any:
        """Return a leaf as an array of jax, or as the Python number that it is."""
        if isinstance(leaf, jax.Array) and not _is_key(leaf):
            return leaf
        name = path if isinstance(path, str) else path()
        if type(leaf) in NUMBERS:
            if (
                type(leaf) is int
                and not -(2**31) <= leaf < 2**31
                and not (has_x64() and -(2**63) <= leaf < 2**63)
            ):
                bits = 64 if has_x64() else 32
                raise DTypeError(
                    f"input `{name}` is the integer {leaf}, which does not fit in {bits} bits"
                )
            return leaf
        if not _is_key(leaf) and (hasattr(leaf, "__array__") or hasattr(leaf, "__jax_array__")):
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
            + ("; a key is passed as rng= of apply" if _is_key(leaf) else "")
        )

    def _as_parameter(self, value: Any, info: ParameterInfo) -> Any:
        """Return a parameter as an array of jax; a Python number takes the type that the model's
        has."""
        leaf = self._as_leaf(value, info.path)
        return (
            jnp.asarray(leaf, dtype_of(info.spec, f"parameter `{info.path}`"))
            if type(leaf) in NUMBERS
            else leaf
        )

    def _static_leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[int]:
        """Return which leaves belong to static arguments."""
        marks = marked_static(args, kwargs, self._model.arguments, self._static_argnames, marked)
        return frozenset(i for i, mark in enumerate(jax.tree.leaves(marks)) if mark)

    def _prepare(
        self, way: "_Way", leaves: Sequence[Any], structure: Any, statics: frozenset[int]
    ) -> "_Call":
        """Describe a call of a signature that is new here, and have it prepared."""
        slotted = jax.tree.unflatten(
            structure, [leaf if i in statics else Slot(i) for i, leaf in enumerate(leaves)]
        )
        arguments, slots = encode(slotted, self._classes, expand=expand)
        infos = self._model.parameters
        paths = [info.path for info in infos] if way.own is not None else []
        paths += ["rng"] if way.key is not None else []
        paths += trees.argument_paths(arguments)
        inputs = [*way.passed, *(leaves[i] for i in slots)]
        described = [self._spec_of(value, path) for value, path in zip(inputs, paths, strict=True)]
        program = self.session.prepare_call(
            pb.Call(
                model=self._model.name,
                arguments=arguments,
                inputs=[specs.encode(spec) for spec in described],
                parameters=way.own is not None,
                rngs=_STREAMS if way.key is not None else (),
                mutable=way.is_mutable,
            ),
            labels=paths,
            timeout_s=self.timeout_s,
        )
        rank = {leaf: i for i, leaf in enumerate(sorted(slots))}  # among the leaves that are data
        order = [*range(len(way.passed)), *(len(way.passed) + rank[leaf] for leaf in slots)]
        changed = [info.path for info in infos if not info.trainable] if way.is_mutable else []
        return _Call(
            program,
            order,
            len(program.outputs) - len(changed),
            changed,
            rebuilder(program.result, self._classes),
        )

    def _spec_of(self, value: Any, path: str) -> Spec:
        if type(value) in NUMBERS:
            return NUMBERS[type(value)]
        if path == "rng":
            return _KEY
        return spec_of(value.shape, value.dtype, path, self.session.framework, self.session.x64)


class _Way(NamedTuple):
    """How a call is made, besides its arguments."""

    own: Sequence[Any] | None  # the parameters and buffers; None: the worker's
    key: Any  # the words of a random key, or None
    is_mutable: bool

    @property
    def passed(self) -> list[Any]:
        """The inputs before the arguments' leaves."""
        return [*(self.own or ()), *(() if self.key is None else (self.key,))]


class _Call(NamedTuple):
    """What a signature needs: the program, its inputs' order, and the way from its outputs to
    the result."""

    program: Program
    order: Sequence[int]
    result_leaves: int
    changed: Sequence[str]  # the buffers whose new values follow the result's leaves
    rebuild: Callable[[Sequence[Any]], Any]


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _key_words(rng: Any) -> Any:
    """Return a key's words, folded to as many as travel.

    Raises:
      StructureError: it is no single key.
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


def _check_names(given: Mapping[str, Any], expected: Sequence[str], what: str) -> None:
    if not isinstance(given, Mapping):
        raise StructureError(
            f"{what} is a {type(given).__qualname__}; expected a dict of arrays by name"
        )
    missing, unknown = set(expected) - set(given), set(given) - set(expected)
    wrong = [f"lacks {sorted(missing)}"] if missing else []
    wrong += [f"has {sorted(unknown)}, which the model does not know"] if unknown else []
    if wrong:
        raise StructureError(f"{what} {' and '.join(wrong)}")


def _not_static(path: str, leaf: Any) -> str:
    if isinstance(leaf, jax.core.Tracer):
        return (
            f"`{path}` is static, but is traced here, so that its value is not known: pass a Python"
            " value, or name the argument in static_argnums or static_argnames of the"
            " surrounding jit"
        )
    return f"`{path}` is static, but is an array of shape {list(leaf.shape)}; pass a Python value"
