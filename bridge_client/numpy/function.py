"""RemoteFunction: calls of a worker's model on NumPy arrays, and the derivatives of these calls."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bridge_client.arguments import (
    Args,
    Kwargs,
    check_arguments,
    method_name,
    names_of,
    present_as,
    recipes_for,
)
from bridge_client.numpy import runs
from bridge_client.numpy.calls import (
    Axes,
    Batch,
    Call,
    Pullback,
    batch_of,
    checked_axes,
    example,
)
from bridge_client.numpy.memory import Array, as_array, dtype_of, spec_of
from bridge_client.numpy.pytrees import dict_of, encoded, leaf_of
from bridge_client.programs import Positions, Recent
from bridge_client.remote.connecting import connect
from bridge_client.session import Session, as_html, checked_limit
from bridge_wire import specs, trees
from bridge_wire.errors import CallerError, RemoteModelError, StructureError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec

_MOST_BYTES = 4 << 20  # of examples in a message


class RemoteFunction:
    """A model of a worker process, as a function of NumPy arrays with derivatives.

    Call it with pytrees (dict, list, tuple, namedtuple, dataclass, None) of arrays and Python
    numbers. Strings, bools, None and the arguments in `static_argnames` are static. Results are
    writable arrays in the session's memory, which returns to the session with their last view; a
    later call passes them without a copy. Derivatives follow JAX's conventions: cotangents pair
    with tangents without conjugation. A part without a derivative, such as an integer or a Python
    number, has None in its place.

    Args:
      target: a worker's address, or a Session.
      name: one of the worker's models; needed only if it hosts several.
      method: one of the model's methods; None calls the model itself.
      parameters: "worker" leaves a model's parameters there, frozen; "client" makes the first
        argument of each call a dict of them, as `parameters()` returns it.
      static_argnames: arguments whose numbers are part of the program instead of its data.
      timeout_s: seconds for each call; None takes the session's.
    Raises:
      WorkerUnavailable: no worker answers.
      UnknownModel: the worker hosts no such model, or several and no name was given.
      CallerError: an option is malformed, or the model has no such method.
    """

    def __init__(
        self,
        target: str | Session,
        *,
        name: str | None = None,
        method: str | None = None,
        parameters: str = "worker",
        static_argnames: str | Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> None:
        if parameters not in ("client", "worker"):
            raise CallerError(
                f"parameters={parameters!r}; expected 'client' or 'worker'"
            )
        if not isinstance(target, str | Session):
            raise CallerError(
                f"the target is a {type(target).__qualname__}; expected a worker's address or a"
                " Session, such as spawn('model.py:function')"
            )
        self.session = connect(target) if isinstance(target, str) else target
        self.timeout_s = checked_limit(timeout_s)
        self._model = self.session.model(name)
        self._method = method_name(method)
        self._names = self._model.arguments_of(self._method)
        self._static = frozenset(names_of("static_argnames", static_argnames))
        self._infos = self._model.parameters if parameters == "client" else ()
        if parameters == "client" and not self._infos:
            raise CallerError(
                f"parameters='client', but the model {self._model.name!r} has no parameters; leave"
                " the option out"
            )
        self._axes: Axes = ()
        self._calls: Recent[Call] = Recent()
        self.__name__ = ".".join(filter(None, (self._model.name, self._method)))
        signature = "" if self._infos else self._model.signature_of(self._method)
        present_as(self, signature, self._model.doc)

    def __repr__(self) -> str:
        return f"RemoteFunction({self.__name__})"

    def _repr_html_(self) -> str:
        return as_html(repr(self), [self._model], self._method)

    def parameters(self) -> dict[str, Array]:
        """Return copies of the model's parameters and buffers, by their tree paths."""
        program = self.session.prepare_parameters(self._model.name)
        names = [info.path for info in self._model.parameters]
        return dict(zip(names, runs.run(program, ()), strict=True))

    def vmap(self, in_axes: Axes = 0) -> "RemoteFunction":
        """Return the function that maps over an axis of the arguments, in one call.

        Its results have the batch axis in front, and its derivatives are those of each example.

        Args:
          in_axes: the batch axis of each positional argument's arrays, or of all of them; None for
            those that all examples share, as they do keyword arguments and Python numbers.
        Raises:
          CallerError: this function maps over an axis already, or an axis is no integer.
        """
        if self._axes != ():
            raise CallerError(f"{self!r} maps over a batch axis already; use one vmap")
        mapped = copy.copy(self)
        mapped._axes = checked_axes(in_axes)
        mapped._calls = Recent()
        return mapped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
          ArgumentError: an argument is missing or unexpected; nothing was sent.
          DTypeError, StructureError, SpecError: an argument cannot be sent; nothing was sent.
          RemoteModelError: the model raised; with the remote traceback.
          WorkerDied: the worker died during the call; the next call reconnects.
          CallTimeout: no answer within the time allowed.
        """
        call, inputs = self._called(args, kwargs)
        return call.result(runs.run(call.batched(call.program), inputs))

    def value_and_grad(
        self,
        *args: Any,
        argnums: int | Sequence[int] = 0,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Return the scalar result and its gradient by one or several positional arguments.

        A gradient has its argument's structure, and the dtypes of its arrays.

        Raises:
          CallerError: the result is no real scalar, or an argument has no derivative.
        """
        numbers = _numbers_of(argnums, len(args))
        call, inputs = self._called(args, kwargs, numbers)
        seed = call.unit_cotangent(self.__name__)
        wrt = call.differentiable(numbers)
        if call.batch is None:
            kept = runs.Kept(call.program, wrt, inputs, lasting=False)
            outputs, pulled = kept.outputs, kept.pull_back((0,), [seed])
        else:
            outputs = runs.run(call.batched(call.program), inputs)
            vjp = call.batched(call.program.vjp(wrt, (0,)), [-1])
            pulled = runs.run(vjp, [*inputs, seed])
        gradients = call.as_arguments(numbers, dict(zip(wrt, pulled, strict=True)))
        one = isinstance(argnums, int)
        return call.result(outputs), gradients[0] if one else gradients

    def vjp(self, *args: Any, **kwargs: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Return the result, and the function from its cotangent to those of the positional
        arguments, a tuple.

        A cotangent has the result's structure; None stands for zero. The worker keeps the
        derivative until the function is dropped; later changes of the arguments are not seen.

        Raises:
          CallerError: no argument has a derivative.
        """
        numbers = tuple(range(len(args)))
        call, inputs = self._called(args, kwargs, numbers)
        wrt = call.differentiable(numbers)
        if call.batch is None:
            kept = runs.Kept(call.program, wrt, inputs, lasting=True)
            return call.result(kept.outputs), Pullback(call, wrt, kept.pull_back)
        # The residual of a batch is that of a sum over examples, so each pullback starts anew.
        inputs = [x.copy() if isinstance(x, np.ndarray) else x for x in inputs]

        def pull(given: Positions, cotangents: Sequence[Array]) -> runs.Arrays:
            vjp = call.batched(call.program.vjp(wrt, given), [0] * len(given))
            return runs.run(vjp, [*inputs, *cotangents])

        outputs = runs.run(call.batched(call.program), inputs)
        return call.result(outputs), Pullback(call, wrt, pull)

    def jvp(
        self, primals: Sequence[Any], tangents: Sequence[Any], **kwargs: Any
    ) -> tuple[Any, Any]:
        """Return the result at the positional arguments `primals`, and its tangent along
        `tangents`.

        Tangents have the structure of their arguments; None stands for zero.

        Raises:
          CallerError: no argument with a derivative has a tangent.
        """
        call, inputs = self._called(tuple(primals), kwargs)
        wrt, moved = call.tangents(tangents)
        given = call.differentiable_outputs()
        outputs = runs.run(call.batched(call.program), inputs)
        jvp = call.batched(call.program.jvp(wrt, given), [call.axis(i) for i in wrt])
        pushed = dict(zip(given, runs.run(jvp, [*inputs, *moved]), strict=True))
        count = len(call.program.outputs)
        return call.result(outputs), call.result([pushed.get(i) for i in range(count)])

    def hvp(
        self, primals: Sequence[Any], tangents: Sequence[Any], **kwargs: Any
    ) -> tuple[Any, ...]:
        """Return the product of the Hessian of a scalar result with `tangents`: a tuple of one
        part per positional argument.

        It is the derivative of the gradient along the tangents, by forward over reverse mode.

        Raises:
          CallerError: the result is no real scalar, or no argument has a tangent.
        """
        primals = tuple(primals)
        numbers = tuple(range(len(primals)))
        call, inputs = self._called(primals, kwargs)
        seed = call.unit_cotangent(self.__name__)
        moving, moved = call.tangents(tangents)
        wrt = call.differentiable(numbers)
        gradient = call.program.vjp(wrt, (0,))
        hvp = gradient.jvp(moving, tuple(range(len(wrt))))
        batched = call.batched(hvp, [-1, *(call.axis(i) for i in moving)])
        products = runs.run(batched, [*inputs, seed, *moved])
        return call.as_arguments(numbers, dict(zip(wrt, products, strict=True)))

    def _called(
        self, args: Args, kwargs: Kwargs, grads: Positions | None = None
    ) -> "tuple[Call, list[Any]]":
        """Return the prepared call and its inputs. `grads`: the positional arguments whose
        derivative is going to be taken by a residual."""
        own: list[Array] = []
        key: list[Any] = []
        if self._infos:
            if not args:
                raise CallerError(
                    "the first argument is missing: the dict of parameters, as parameters() returns"
                    " it"
                )
            own, args = self._own(args[0]), args[1:]
        arguments = None
        are_arrays = all(type(each) is np.ndarray for each in args)
        if are_arrays and not kwargs and not self._static:
            inputs = [*own, *args]
        else:
            arguments = encoded(args, kwargs, self._names, self._static)
            key.append(arguments.tree.SerializeToString(deterministic=True))
            inputs = [*own, *(leaf for leaves in arguments.leaves for leaf in leaves)]
        for value in inputs:
            if isinstance(value, np.ndarray):
                key += (value.dtype, value.shape)
            else:
                key.append(type(value))
        call = self._calls[tuple(key)]
        if call is None:
            expected = self._model.signature_of(self._method)
            check_arguments(self._model.name, expected, (args, kwargs), rngs=())
            items = leaf_of(len(args)) if arguments is None else arguments.items
            sizes = [1] * len(args)
            tree = trees.positional(len(args))
            if arguments is not None:
                sizes, tree = list(map(len, arguments.leaves[:-1])), arguments.tree
            if own:
                names = [info.path for info in self._infos]
                items, sizes = [dict_of(names), *items], [len(own), *sizes]
            call = self._prepare(tree, inputs, items, sizes, grads)
            self._calls.remember(tuple(key), call)
        return call, inputs

    def _own(self, parameters: Any) -> list[Array]:
        """Return a call's parameters and buffers, in the model's order."""
        names = [info.path for info in self._infos]
        if not isinstance(parameters, Mapping) or set(parameters) != set(names):
            found = (
                sorted(map(str, parameters))
                if isinstance(parameters, Mapping)
                else type(parameters).__qualname__
            )
            raise StructureError(
                f"the first argument has {found}; expected a dict of the parameters {names}, as"
                " parameters() returns it"
            )
        return [as_array(parameters[name], name) for name in names]

    def _prepare(
        self,
        arguments: pb.Tree,
        inputs: Sequence[Any],
        items: Sequence[pb.Tree],
        sizes: Sequence[int],
        grads: Positions | None,
    ) -> "Call":
        """Describe a call with a new signature, and prepare its program."""
        infos = self._infos
        paths = [info.path for info in infos] + trees.argument_paths(arguments)
        x64 = self.session.x64
        described = [
            spec_of(value, path, x64) for value, path in zip(inputs, paths, strict=True)
        ]
        batch = batch_of(self._axes, sizes, described, paths)
        if batch is not None:
            described = list(map(example, described, batch.axes))
        message = pb.Call(
            model=self._model.name,
            arguments=arguments,
            inputs=map(specs.encode, described),
            parameters=bool(infos),
            recipes=recipes_for(arguments),
            method=self._method,
        )
        parts = (message, paths, items, sizes, batch)
        try:
            return self._made(*parts, grads)
        except RemoteModelError:
            # Of torch, whose models may fail on the values that a worker makes up.
            values, axes = inputs[len(infos) :], [-1] * len(inputs)
            if batch is not None:
                axes = list(batch.axes)
            is_sent = sum(map(_nbytes, values)) <= _MOST_BYTES
            if self.session.framework != "torch" or not is_sent:
                raise
        of_values = described[len(infos) :], axes[len(infos) :]
        message.examples.extend(map(_bytes_of, values, *of_values))
        return self._made(*parts, grads)

    def _made(
        self,
        message: pb.Call,
        paths: Sequence[str],
        items: Sequence[pb.Tree],
        sizes: Sequence[int],
        batch: Batch | None,
        grads: Positions | None,
    ) -> Call:
        """Prepare a call, with a residual if its derivative is going to be taken by one."""
        program = self.session.described_call(message, paths, self.timeout_s)
        infos = enumerate(self._infos)
        frozen = frozenset(i for i, info in infos if not info.trainable)
        call = Call(program, items, sizes, batch, frozen)
        wrt = call.differentiable(grads) if grads is not None else ()
        if wrt and batch is None:
            program.prepare_keeping(wrt)
        else:
            self.session.prepare(program)
        for spec in program.outputs:
            dtype_of(spec.dtype)  # before anything runs, since NumPy may lack it
        return call


def _numbers_of(argnums: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Return the positions of positional arguments.

    Raises:
      CallerError: there is no such argument.
    """
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not numbers or any(not -count <= number < count for number in numbers):
        raise CallerError(
            f"argnums={argnums!r}, but the call has {count} positional arguments"
        )
    return tuple(number % count for number in numbers)


def _nbytes(value: Any) -> int:
    return value.nbytes if isinstance(value, np.ndarray) else 0


def _bytes_of(value: Any, spec: Spec, axis: int) -> bytes:
    """Return the elements of an input's first example, row-major, in a type."""
    array = np.asarray(value)
    if axis >= 0:
        array = np.moveaxis(array, axis, 0)[:1]
    return array.astype(dtype_of(spec.dtype)).tobytes()
