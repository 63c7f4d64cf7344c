"""State and randomness: buffers that a call changes, and random streams whose keys torch's
generator decides."""

import copy
import gc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bridge_client import Session, connect, spawn
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import CallerError, ProtocolError, RemoteModelError
from bridge_wire.pb import bridge_pb2 as pb
from tests.client.torch_client.conftest import Remote
from tests.client.torch_client.reference import assert_within
from tests.client.torch_client.stateful_models import (
    counted,
    equinox_normed,
    moving,
    noise,
    noisy,
    noisy_pair,
    two_noises,
)
from tests.conftest import ROOT, python_of

MODELS = [
    "noisy",
    "counted",
    "equinox_normed",
    "moving",
    "noisy_haiku",
    "noise",
    "two_noises",
    "noisy_pair",
]
STATEFUL: dict[str, dict[str, Any]] = {
    "noisy": {"rngs": "dropout", "mutable": True},
    "counted": {"rngs": "dropout", "mutable": True},
    "equinox_normed": {"rngs": "key", "mutable": True},
    "moving": {"rngs": "any", "mutable": True},
}


@pytest.fixture(scope="module")
def stateful_worker() -> Iterator[Session]:
    """A worker that hosts the models of stateful_models.py."""
    targets = {
        name: f"tests.client.torch_client.stateful_models:{name}"
        for name in [*MODELS, "counting"]
    }
    with spawn(jax_model=targets, python=python_of(".venv-jax"), cwd=ROOT) as session:
        yield session


@pytest.fixture
def session(stateful_worker: Session) -> Iterator[Session]:
    """A new session with that worker."""
    with connect(stateful_worker.address, lane="local") as session:
        yield session


@pytest.fixture(autouse=True)
def nothing_is_held(session: Session) -> Iterator[None]:
    """After each test there are no residuals and no leased blocks."""
    yield
    gc.collect()
    stats = session.stats()
    assert (stats["residuals"], stats["blocks"]) == (0, 0)


@pytest.fixture
def stateful(remote: Remote) -> Callable[[str], RemoteJaxFunction]:
    """Makes functions with the random streams and the state that their models have."""
    return lambda name: remote(name, **STATEFUL[name])


def batch() -> Tensor:
    return torch.from_numpy(
        np.random.default_rng(7).normal(size=(4, 3)).astype(np.float32)
    )


def key_of(stream: str) -> jax.Array:
    """Return the key of a stream in the next call: what the call is going to draw, with the
    stream's name."""
    state = torch.get_rng_state()
    words = torch.randint(0, 2**32, (2,), dtype=torch.uint32).numpy()
    torch.set_rng_state(state)
    return jax.random.fold_in(
        jax.random.wrap_key_data(words), zlib.crc32(stream.encode())
    )


def values(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: buffer.numpy().copy() for name, buffer in model.named_buffers()}


# What frameworks do -------------------------------------------------------------------------------


def in_linen(x: Tensor) -> tuple[Any, list[Any]]:
    module, variables = noisy
    y, after = module.apply(
        variables,
        x.numpy(),
        rngs={"dropout": key_of("dropout")},
        mutable=["batch_stats"],
    )
    return y, jax.tree.leaves(after)


def in_equinox(x: Tensor) -> tuple[Any, list[Any]]:
    module, state = equinox_normed
    y, after = module(
        jnp.asarray(x.numpy()),
        jax.tree.map(lambda leaf: leaf, state),
        key=key_of("key"),
    )
    return y, jax.tree.leaves(after)


def in_haiku(x: Tensor) -> tuple[Any, list[Any]]:
    transformed, (params, state) = moving
    y, after = transformed.apply(params, state, key_of("any"), x.numpy())
    return y, jax.tree.leaves(after)


@pytest.mark.parametrize(
    ("name", "reference"),
    [("noisy", in_linen), ("equinox_normed", in_equinox), ("moving", in_haiku)],
)
def test_a_call_in_training_is_that_of_the_framework(
    stateful: Callable[[str], RemoteJaxFunction],
    name: str,
    reference: Callable[[Tensor], tuple[Any, list[Any]]],
) -> None:
    """Result and new state are those that the framework itself gives for this key, the
    documented one."""
    model, x = stateful(name), batch()
    expected, state = reference(x)
    assert_within(model(x), np.asarray(expected), 1e-6)
    for buffer, new in zip(model.buffers(), state, strict=True):
        np.testing.assert_allclose(buffer.numpy(), new, atol=1e-6)


def test_a_model_of_this_process_keeps_its_own_state() -> None:
    """In one process the module's buffers change likewise, and the variables that the model was
    made of do not."""
    module, variables = noisy
    arrays = jax.tree.map(jnp.asarray, variables)
    model, x = (
        RemoteJaxFunction((module, arrays), rngs="dropout", mutable=True),
        batch(),
    )
    expected, state = in_linen(x)
    assert_within(model(x), np.asarray(expected), 1e-6)
    for buffer, new in zip(model.buffers(), state, strict=True):
        np.testing.assert_allclose(buffer.numpy(), new, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, arrays, variables)


def test_nnx_state_is_kept_and_streams_are_reseeded(
    stateful: Callable[[str], RemoteJaxFunction],
) -> None:
    """An nnx module's statistics count the calls, and what is dropped follows the key of the
    call alone."""
    model, x = stateful("counted"), batch()
    torch.manual_seed(0)
    first, second = model(x), model(x)
    torch.manual_seed(0)
    third = model(x)
    assert values(model)["calls"] == counted.calls[...] + 3
    torch.testing.assert_close(third, 3 * first)
    assert not torch.equal(second == 0, first == 0)


def test_the_default_device_does_not_matter(
    stateful: Callable[[str], RemoteJaxFunction],
) -> None:
    """Keys, numbers and empty tensors are made in the host's memory under
    torch.set_default_device, too."""
    model, x = stateful("noisy"), batch().requires_grad_()
    with torch.device("meta"):
        y = model(x)
        y.sum().backward()
    assert (y.device.type, x.grad.device.type) == ("cpu", "cpu")


def test_functions_take_the_keys_by_name(remote: Remote) -> None:
    """Each stream of a function, or of a pair (apply, params), is a keyword argument with a key
    of its own."""
    x = batch()
    expected = noise(x.numpy(), key_of("key"))
    assert_within(remote("noise", rngs="key")(x), np.asarray(expected), 1e-6)
    expected = two_noises(x.numpy(), key_of("left"), key_of("right"))
    for seen, wanted in zip(
        remote("two_noises", rngs=("left", "right"))(x), expected, strict=True
    ):
        assert_within(seen, np.asarray(wanted), 1e-6)
    apply, params = noisy_pair
    expected = apply(params, x.numpy(), key=key_of("key"))
    assert_within(remote("noisy_pair", rngs="key")(x), np.asarray(expected), 1e-6)


def test_haiku_transforms_take_one_key(remote: Remote) -> None:
    """A haiku model draws from the one stream that is named, whatever its name; two are refused."""
    model, x = remote("noisy_haiku", rngs="noise"), batch()
    expected = 2 * x.numpy() + np.asarray(
        jax.random.normal(_haiku_key(key_of("noise")))
    )
    assert_within(model(x), expected, 1e-6)
    with pytest.raises(CallerError, match="one random stream"):
        remote("noisy_haiku", rngs=("a", "b"))(x)


def _haiku_key(key: jax.Array) -> jax.Array:
    return jax.random.split(key)[1]


# Buffers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATEFUL)
def test_gradients_are_right_after_the_buffers_have_changed(
    stateful: Callable[[str], RemoteJaxFunction], name: str
) -> None:
    """Two forwards and then both backwards give the gradients of the state that each forward has
    seen."""
    one_by_one, together = stateful(name), stateful(name)
    expected = []
    for seed in (1, 2):
        x = batch().requires_grad_()
        torch.manual_seed(seed)
        one_by_one(x).square().sum().backward()
        expected.append(x.grad)
    pairs = []
    for seed in (1, 2):
        x = batch().requires_grad_()
        torch.manual_seed(seed)
        pairs.append((x, together(x).square().sum()))
    for (x, loss), gradient in zip(pairs, expected, strict=True):
        loss.backward()
        torch.testing.assert_close(x.grad, gradient)
    for x, y in zip(one_by_one.buffers(), together.buffers(), strict=True):
        torch.testing.assert_close(x, y)
        assert not x.requires_grad


def test_recomputed_gradients_see_the_old_state(
    stateful: Callable[[str], RemoteJaxFunction], session: Session
) -> None:
    """A backward under create_graph, which runs the model anew, does so with the state and the
    key of its forward."""
    model, x = stateful("counted"), batch().requires_grad_()
    y = model(x).square().sum()
    model(x)
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    (expected,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(gradient, expected)


def test_buffers_change_in_place_and_in_the_slab(
    stateful: Callable[[str], RemoteJaxFunction], session: Session
) -> None:
    """A buffer keeps its memory, in the slab, through calls with and without grad, as that of
    torch's BatchNorm."""
    model, x = stateful("noisy"), batch()
    addresses = [buffer.data_ptr() for buffer in model.buffers()]
    state = model.state_dict()
    model(x)
    with torch.no_grad():
        model(x)
    assert [buffer.data_ptr() for buffer in model.buffers()] == addresses
    assert all(
        session.pool.address_of(address, 12) is not None for address in addresses
    )
    torch.testing.assert_close(
        dict(model.named_buffers()),
        {n: x for n, x in state.items() if n.startswith("batch")},
    )


def test_no_buffer_changes_in_eval_mode(
    stateful: Callable[[str], RemoteJaxFunction],
) -> None:
    """In eval mode nothing changes, and nothing is drawn from torch's generator."""
    model, x = stateful("noisy").eval(), batch()
    before, state = values(model), torch.get_rng_state()
    module, variables = noisy
    assert_within(
        model(x, train=False),
        np.asarray(module.apply(variables, x.numpy(), train=False)),
        1e-6,
    )
    np.testing.assert_equal(values(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RemoteModelError, match="batch_stats"):
        model(x, train=True)


def test_functional_call_changes_the_buffers_that_it_is_given(
    stateful: Callable[[str], RemoteJaxFunction],
) -> None:
    """Under torch.func.functional_call the given buffers change, and the module's own do not."""
    model, x = stateful("noisy"), batch()
    before = values(model)
    given = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.func.functional_call(model, given, (x,))
    np.testing.assert_equal(values(model), before)
    expected = copy.deepcopy(model)
    expected(x)
    torch.testing.assert_close(given, dict(expected.named_buffers()))


def test_a_copied_model_has_state_of_its_own(
    stateful: Callable[[str], RemoteJaxFunction], session: Session
) -> None:
    """The statistics of a copy that was cast to and fro are in the slab too, and change apart
    from the original's."""
    model, x = stateful("noisy"), batch()
    twin = copy.deepcopy(model).double().float()
    assert all(
        session.pool.address_of(buffer.data_ptr(), 12) is not None
        for buffer in twin.buffers()
    )
    before = values(model)
    twin(x)
    np.testing.assert_equal(values(model), before)
    assert any((new != before[name]).any() for name, new in values(twin).items())


def test_buffers_keep_a_dtype_that_the_module_was_cast_to(
    stateful: Callable[[str], RemoteJaxFunction],
) -> None:
    """A module cast to bfloat16 has bfloat16 statistics after a call, too."""
    model = stateful("noisy").to(torch.bfloat16)
    model(batch().to(torch.bfloat16))
    assert {buffer.dtype for buffer in model.buffers()} == {torch.bfloat16}


# Randomness ---------------------------------------------------------------------------------------


def test_the_seed_decides_what_is_drawn(remote: Remote) -> None:
    """The same seed gives the same noise, and each call other noise than the last."""
    model, x = remote("noise", rngs="key"), batch()
    torch.manual_seed(3)
    first, second = model(x), model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), first)
    assert torch.equal(model(x), second)
    assert not torch.equal(first, second)


def test_both_lanes_draw_the_same(stateful_worker: Session) -> None:
    """The noise does not depend on the lane."""
    drawn = []
    for lane in ("local", "grpc"):
        with connect(stateful_worker.address, lane=lane) as session:
            torch.manual_seed(4)
            drawn.append(
                RemoteJaxFunction(session, name="noise", rngs="key")(batch()).clone()
            )
    assert torch.equal(*drawn)


def test_checkpointing_draws_the_same_again(remote: Remote) -> None:
    """What torch.utils.checkpoint recomputes in the backward has the noise of the forward."""
    model = remote("noisy", rngs="dropout", mutable=True)
    gradients = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        x = batch().requires_grad_()
        torch.manual_seed(5)
        call(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_vmap_treats_randomness_as_torch_does(remote: Remote) -> None:
    """Under vmap noise is refused, or the same, or different for each element, as `randomness`
    says."""
    model = remote("noise", rngs="key")
    x = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(model)(x)
    same = torch.func.vmap(model, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(model, randomness="different")(x)
    assert not torch.equal(different[0], different[1])


def test_submitted_calls_draw_in_the_order_of_their_submission(remote: Remote) -> None:
    """The keys of submitted calls are drawn when they are submitted; calls that change buffers
    cannot be."""
    model, x = remote("noise", rngs="key"), batch()
    torch.manual_seed(6)
    expected = [model(x).clone() for _ in range(4)]
    torch.manual_seed(6)
    futures = [model.submit(x) for _ in range(4)]
    assert all(
        torch.equal(future.result(), y)
        for future, y in zip(futures, expected, strict=True)
    )
    changing = remote("noisy", rngs="dropout", mutable=True)
    with pytest.raises(CallerError, match="cannot be submitted"):
        changing.submit(x)
    changing.eval().submit(x, train=False).result()


def test_parameters_left_on_the_worker_may_have_randomness(remote: Remote) -> None:
    """With parameters="worker" a key is sent too, and buffers cannot change."""
    x = batch()
    expected = noisy_pair[0](noisy_pair[1], x.numpy(), key=key_of("key"))
    assert_within(
        remote("noisy_pair", parameters="worker", rngs="key")(x),
        np.asarray(expected),
        1e-6,
    )
    with pytest.raises(CallerError, match="parameters='client'"):
        remote("noisy", parameters="worker", mutable=True)


# Transforms and compilation -----------------------------------------------------------------------


def test_state_under_transforms(stateful: Callable[[str], RemoteJaxFunction]) -> None:
    """Under torch.func.grad given buffers change as BatchNorm's do; captured ones raise torch's
    own error."""
    model, x = stateful("noisy"), batch()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(
        parameters: dict[str, Tensor], buffers: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        own = {name: buffer.clone() for name, buffer in buffers.items()}
        y = torch.func.functional_call(model, {**parameters, **own}, (x,))
        return y.square().sum(), own

    torch.manual_seed(8)
    gradients, after = torch.func.grad(loss, has_aux=True)(parameters, buffers)
    torch.manual_seed(8)
    model(x).square().sum().backward()
    torch.testing.assert_close(
        gradients, {name: p.grad for name, p in model.named_parameters()}
    )
    torch.testing.assert_close(after, dict(model.named_buffers()))
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(
            parameters
        )


def test_state_has_no_tangents(stateful: Callable[[str], RemoteJaxFunction]) -> None:
    """Forward-mode derivatives go through the result and not into the buffers."""
    model, x = stateful("counted"), batch()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        torch.manual_seed(9)
        y, tangent = torch.autograd.forward_ad.unpack_dual(model(dual))
        assert tangent is not None
        assert all(
            torch.autograd.forward_ad.unpack_dual(buffer).tangent is None
            for buffer in model.buffers()
        )
    kept = y != 0
    torch.testing.assert_close(tangent * x * kept, y)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_training(
    stateful: Callable[[str], RemoteJaxFunction], backend: str
) -> None:
    """A compiled module changes its buffers as an eager one, draws a new key per call, and has
    an eval mode."""
    model, twin, x = stateful("noisy"), stateful("noisy"), batch().requires_grad_()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.manual_seed(10)
    first, second = compiled(x), compiled(x)
    second.sum().backward()
    assert not torch.equal(first == 0, second == 0)
    torch.manual_seed(10)
    expected = twin(x), twin(x)
    torch.manual_seed(10)
    torch.testing.assert_close(compiled(x), first)
    twin(x)
    if backend == "aot_eager":  # inductor has a random generator of its own
        torch.testing.assert_close((first, second), expected)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    torch.testing.assert_close(compiled(x, train=False), twin.eval()(x, train=False))


# Bad input ----------------------------------------------------------------------------------------


def test_what_a_model_lacks_is_refused_by_name(remote: Remote) -> None:
    """Streams and state that a model does not have raise CallerError, which says what there is."""
    x = batch()
    with pytest.raises(CallerError, match=r"'key' .*as in rngs='key'.*\(x, key\)"):
        remote("noise", rngs="dropout")(x)
    with pytest.raises(CallerError, match=r"no arguments \['dropout'\].*'x'\]"):
        remote("counting", rngs="dropout")(x)
    with pytest.raises(
        CallerError, match=r"no random streams \['noise'\].*\['dropout'\]"
    ):
        remote("counted", rngs="noise")(x)
    with pytest.raises(CallerError, match="leave out one"):
        remote("noise", rngs="key")(x, key=x)
    with pytest.raises(CallerError, match="no buffers"):
        remote("noise", mutable=True)
    with pytest.raises(CallerError, match="does not return a new state"):
        remote("counting", mutable=True)(x)
    with pytest.raises(CallerError, match="rngs"):
        remote("noise", rngs=("key", "key"))
    with pytest.raises(CallerError, match="rngs=3"):
        remote("noise", rngs=3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mutable", True, "must pass the parameters"),
        ("rngs", ["key"], "came with 1 specs"),
        ("rngs", ["key", "key"], "random streams"),
        ("rngs", [""], "random streams"),
        ("rngs", [str(i) for i in range(65)], "65 random streams"),
    ],
)
def test_malformed_requests_are_refused(
    session: Session, field: str, value: Any, message: str
) -> None:
    """A request without the parameters, without the key, or with nameless streams breaks the
    protocol."""
    leaf = pb.Tree(leaf=pb.Tree.Leaf())
    arguments = pb.Tree(
        tuple=pb.Tree.Sequence(
            items=[
                pb.Tree(tuple=pb.Tree.Sequence(items=[leaf])),
                pb.Tree(dict=pb.Tree.Mapping()),
            ]
        )
    )
    array, key = (
        pb.Spec(dtype=pb.DTYPE_FLOAT32, shape=[3]),
        pb.Spec(dtype=pb.DTYPE_UINT32, shape=[2]),
    )
    inputs = [key, array] if "specs" not in message and field == "rngs" else [array]
    call = pb.Call(model="noise", arguments=arguments, inputs=inputs, **{field: value})
    with pytest.raises(ProtocolError, match=message):
        session.prepare_call(call, labels=["x"] * len(inputs))


def test_a_key_of_another_type_is_refused(session: Session) -> None:
    """The key is uint32[2] and nothing else."""
    leaf = pb.Tree(leaf=pb.Tree.Leaf())
    args = pb.Tree(tuple=pb.Tree.Sequence(items=[leaf]))
    arguments = pb.Tree(
        tuple=pb.Tree.Sequence(items=[args, pb.Tree(dict=pb.Tree.Mapping())])
    )
    array = pb.Spec(dtype=pb.DTYPE_FLOAT32, shape=[2])
    with pytest.raises(ProtocolError, match=r"expected uint32\[2\]"):
        session.prepare_call(
            pb.Call(
                model="noise", arguments=arguments, inputs=[array, array], rngs=["key"]
            )
        )
