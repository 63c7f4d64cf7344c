"""Names for the classes in results, by which instances outlive this worker.

An instance's class, static parts and custom nodes live in this process. Its origin names the call
that first made it; another process with the same model makes it again by tracing that call.
Imports no framework.
"""

from collections.abc import Callable, Mapping, Sequence

from bridge_wire.classes import name_of_class, origins
from bridge_wire.errors import ModelChanged, ProtocolError, UnknownModel
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.recipes import Recipes, origin_of, records, returned_in

_MOST_RECIPES = 4096  # of a call
_MOST_STEPS = 256  # calls that a call's instances may need


# The origins in the results of calls that were traced for one request.
_Traced = dict[bytes, Sequence[str]]


class Identities:
    """Names the records of results, and makes those of returned instances again."""

    def __init__(
        self,
        fingerprint: Callable[[pb.Call], bytes],
        result: Callable[[pb.Call], pb.Tree],
    ) -> None:
        """`fingerprint` and `result` are those of an untransformed call; both trace it."""
        self._fingerprint = fingerprint
        self._result = result
        self._recipes = Recipes()

    def named(self, call: pb.Call, result: pb.Tree) -> pb.Tree:
        """Return a call's result with lasting origins."""
        tree = pb.Tree()
        tree.CopyFrom(result)
        found = list(records(tree))
        passed = returned_in(call.arguments)
        fingerprint = self._fingerprint(call) if found else b""
        made = plain(call).SerializeToString(deterministic=True)
        for i, record in enumerate(found):
            cls = origins.class_of(record.origin)
            if cls is None or not fingerprint:
                continue
            lasting = origin_of(name_of_class(cls), fingerprint, made, i)
            recipe = pb.Recipe(
                origin=lasting, fingerprint=fingerprint, call=made, record=i
            )
            record.origin = origins.rename(record.origin, lasting)
            if record.origin == lasting:
                self._recipes.learn([recipe])
            # A loop over a state that an earlier worker has named keeps that name.
            same = [name for name in passed if origins.are_same(name, record.origin)]
            if same and record.origin not in same:
                record.origin = same[0]
        return tree

    def recipes_of(self, result: pb.Tree) -> list[pb.Recipe]:
        """Return the recipes of a result's origins."""
        return self._recipes.of(record.origin for record in records(result))

    def recalled(self, call: pb.Call) -> pb.Call:
        """Return a call without its recipes, after each instance that it returns is known here.

        Raises:
          ModelChanged: an instance was made by a model that has changed since.
          ProtocolError: a recipe is not that of its origin.
        """
        if not call.recipes:
            return call
        if len(call.recipes) > _MOST_RECIPES:
            raise ProtocolError(
                f"a call has {len(call.recipes)} recipes; at most {_MOST_RECIPES} are allowed"
            )
        self._make(call, {recipe.origin: recipe for recipe in call.recipes}, {})
        known = pb.Call()
        known.CopyFrom(call)
        known.ClearField("recipes")
        return known

    def _make(
        self, call: pb.Call, recipes: Mapping[str, pb.Recipe], traced: _Traced
    ) -> None:
        """Make the origins that a call returns and that are not known here."""
        for origin in returned_in(call.arguments):
            if origins.class_of(origin) is None and origin in recipes:
                recipe = recipes[origin]
                self._learn(recipe, self._origins_of(recipe, recipes, traced))

    def _origins_of(
        self, recipe: pb.Recipe, recipes: Mapping[str, pb.Recipe], traced: _Traced
    ) -> Sequence[str]:
        """Return the origins in the result of a recipe's call, each call traced once."""
        call, key = _call_of(recipe), recipe.fingerprint + recipe.call
        known = traced.get(key)
        if known is None:
            if len(traced) == _MOST_STEPS:
                raise ModelChanged(
                    f"an instance was made by more than {_MOST_STEPS} successive calls, which this"
                    " worker would have to make again; begin with a new one"
                )
            traced[key] = ()
            # An origin is a digest of its recipe, so this ends.
            self._make(call, recipes, traced)
            self._check(recipe, call)
            known = [record.origin for record in records(self._result(call))]
            traced[key] = known
        return known

    def _check(self, recipe: pb.Recipe, call: pb.Call) -> None:
        try:
            fingerprint = self._fingerprint(call)
        except UnknownModel as error:
            raise ModelChanged(
                f"a returned instance cannot be made here: {error}"
            ) from error
        if fingerprint != recipe.fingerprint:
            raise ModelChanged(
                f"a {_name_in(recipe)} was first made by the model {call.model[:100]!r}, which has"
                f" changed since; call {call.model[:100]!r} again"
            )

    def _learn(self, recipe: pb.Recipe, found: Sequence[str]) -> None:
        made = found[recipe.record] if recipe.record < len(found) else ""
        cls = origins.class_of(made)
        if cls is None or name_of_class(cls) != recipe.origin.partition("#")[0]:
            raise ProtocolError(
                f"the record {recipe.record} of a recipe's result is no {_name_in(recipe)!r}"
            )
        if origins.rename(made, recipe.origin) != recipe.origin:
            origins.alias(made, recipe.origin)
        self._recipes.learn([recipe])


def _name_in(recipe: pb.Recipe) -> str:
    return recipe.origin.partition("#")[0][:200]


def plain(call: pb.Call) -> pb.Call:
    """Return a call without its transforms, residual and recipes."""
    made = pb.Call()
    made.CopyFrom(call)
    for name in ("transforms", "keep", "recipes"):
        made.ClearField(name)
    return made


def _call_of(recipe: pb.Recipe) -> pb.Call:
    """Return a recipe's call, after a check that the origin is that of the recipe."""
    try:
        call = pb.Call.FromString(recipe.call)
    except Exception as error:
        raise ProtocolError("a recipe's call cannot be decoded") from error
    if plain(call).SerializeToString(deterministic=True) != recipe.call:
        raise ProtocolError("a recipe's call has transforms, or is not canonical")
    name = recipe.origin.partition("#")[0]
    digested = origin_of(name, recipe.fingerprint, recipe.call, recipe.record)
    if digested != recipe.origin:
        raise ProtocolError(f"the recipe of {name[:200]!r} is that of another origin")
    return call
