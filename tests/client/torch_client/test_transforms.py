"""torch.func and the rest of torch's ways to differentiate: each transform, and transforms of
transforms.

What they make of a remote function is compared in float64 with what they make of the same function
in torch.
"""

import functools
import gc
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

from bridge_client import Session
from bridge_wire.errors import RemoteModelError
from tests.client.torch_client.conftest import Remote

Function = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def nothing_is_held(x64_session: Session) -> Iterator[None]:
    """After each test there are no residuals and no leased blocks, as before it."""
    yield
    if x64_session.stats()["blocks"]:
        gc.collect()  # a model of the test is a cycle, and its parameters are blocks
    stats = x64_session.stats()
    assert (stats["residuals"], stats["blocks"]) == (0, 0)


@pytest.fixture
def case(x64_remote: Remote) -> Callable[..., Any]:
    """Calls the worker's gradient case of a name: `case("sine", x, y)`."""
    return x64_remote("gradient_case")


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the same numbers each time, away from zero."""
    return (
        torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
        + 0.2
    )


def assert_same(seen: Any, expected: Any) -> None:
    torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-10)


def layer_norm(x: Tensor) -> Tensor:
    # Not torch's own, whose Hessian by x, with x for weight and bias too, is not symmetric (torch
    # 2.13).
    centred = x - x.mean(-1, keepdim=True)
    return centred * ((centred**2).mean(-1, keepdim=True) + 1e-3).rsqrt() * x + x


# By the name of a gradient case, which is called with one vector in each place: the same in torch.
TWINS: dict[str, tuple[int, Function]] = {
    "sine": (2, lambda x: x.sin() * x.exp()),
    "matmul": (2, lambda x: x @ x),
    "layer norm": (3, layer_norm),
}


def summed(f: Function) -> Function:
    """Return the scalar function that grad and hessian want, of which no derivative is constant."""
    return lambda x: (f(x) ** 2).sum()


TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "grad": lambda f: grad(summed(f))(rand(3)),
    "grad_and_value": lambda f: grad_and_value(summed(f))(rand(3)),
    "vjp": lambda f: vjp(f, rand(3))[1](torch.full_like(f(rand(3)), 2.0)),
    "jvp": lambda f: jvp(f, (rand(3),), (rand(3) - 1,)),
    "linearize": lambda f: linearize(f, rand(3))[1](rand(3) - 1),
    "jacrev": lambda f: jacrev(f)(rand(3)),
    "jacfwd": lambda f: jacfwd(f)(rand(3)),
    "hessian": lambda f: hessian(f)(rand(3)),
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f))(rand(3)),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f))(rand(3)),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f))(rand(3)),
    "grad(grad)": lambda f: grad(lambda x: (grad(summed(f))(x) ** 2).sum())(rand(3)),
    "third derivative": lambda f: jacfwd(jacrev(grad(summed(f))))(rand(3)),
    "vmap": lambda f: vmap(f)(rand(4, 3)),
    "vmap(in_dims=1, out_dims=-1)": lambda f: vmap(f, in_dims=1, out_dims=-1)(
        rand(3, 4)
    ),
    "vmap(chunk_size=2)": lambda f: vmap(grad(summed(f)), chunk_size=2)(rand(5, 3)),
    "vmap(vmap)": lambda f: vmap(vmap(f, in_dims=1), in_dims=-1)(
        rand(2, 3, 4).transpose(0, 1)
    ),
    "vmap(grad)": lambda f: vmap(grad(summed(f)))(rand(4, 3)),
    "vmap(jacrev)": lambda f: vmap(jacrev(f))(rand(4, 3)),
    "vmap(hessian)": lambda f: vmap(hessian(f))(rand(4, 3)),
    "vmap(vmap(grad))": lambda f: vmap(vmap(grad(summed(f))))(rand(2, 4, 3)),
    "grad(vmap)": lambda f: grad(lambda x: (vmap(f)(x) ** 2).sum())(rand(4, 3)),
    "jacfwd(vmap)": lambda f: jacfwd(vmap(f))(rand(4, 3)),
    "hessian(vmap)": lambda f: hessian(lambda x: (vmap(f)(x) ** 2).sum())(rand(2, 3)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", TWINS)
def test_transforms_are_those_of_the_function_in_torch(
    case: Callable[..., Any], name: str, transform: str
) -> None:
    """Each transform of a remote function gives what it gives of the same function written in
    torch."""
    places, twin = TWINS[name]
    transformed = TRANSFORMS[transform]
    assert_same(transformed(lambda x: case(name, *[x] * places)), transformed(twin))


def test_derivatives_by_several_arguments(case: Callable[..., Any]) -> None:
    """argnums selects arguments, also in every block of a Hessian."""
    args = rand(2, 3), rand(3, 2)

    def remote(x: Tensor, y: Tensor) -> Tensor:
        return case("matmul", x, y).sin().sum()

    def twin(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y).sin().sum()

    assert_same(grad(remote, argnums=(1, 0))(*args), grad(twin, argnums=(1, 0))(*args))
    assert_same(
        hessian(remote, argnums=(0, 1))(*args), hessian(twin, argnums=(0, 1))(*args)
    )


def test_vmap_over_some_arguments(case: Callable[..., Any]) -> None:
    """An argument whose in_dim is None is shared by the batch, and structures of in_dims reach
    into dicts."""
    assert_same(
        vmap(lambda x, y: case("matmul", x, y), in_dims=(1, None))(
            rand(3, 5, 2), rand(2, 4)
        ),
        rand(3, 5, 2).transpose(0, 1) @ rand(2, 4),
    )
    tree = {"inner": (rand(5, 2, 3), rand(3, 2)), "list": [rand(2, 5)]}
    dims = {"inner": (0, None), "list": [1]}
    seen = vmap(lambda tree, scale: case("pytree", tree, scale), in_dims=(dims, None))(
        tree, 2.0
    )
    assert_same(seen["out"], torch.tanh(rand(5, 2, 3) @ rand(3, 2)) * 2)
    assert_same(seen["sum"][0], rand(2, 5).sum(0))
    assert_same(seen["sum"][1][0], (rand(2, 5) * rand(5, 2, 3).mean((1, 2))).T)


def calls_of(session: Session, run: Callable[[], Any]) -> int:
    """Return how many calls a computation makes on the worker."""
    before = session.stats()["calls"]
    run()
    return session.stats()["calls"] - before


def test_a_batch_is_one_call(x64_session: Session, case: Callable[..., Any]) -> None:
    """vmap makes one call on the worker for the whole batch, and nested vmaps one for all of
    theirs."""

    def sine(x: Tensor) -> Tensor:
        return case("sine", x, x)

    assert calls_of(x64_session, lambda: vmap(sine)(rand(50, 3))) == 1
    assert calls_of(x64_session, lambda: vmap(vmap(sine))(rand(4, 50, 3))) == 1
    assert calls_of(x64_session, lambda: vmap(grad(summed(sine)))(rand(50, 3))) == 2


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
def test_a_batch_of_derivatives_takes_as_many_calls_as_one(
    x64_session: Session,
    case: Callable[..., Any],
    transform: Callable[[Function], Function],
) -> None:
    """Under vmap a derivative makes no more calls than without, and a Jacobian's rows are one
    batch too."""
    derivative = transform(lambda x: case("sine", x, x))
    one = calls_of(x64_session, lambda: derivative(rand(3)))
    assert one <= (4 if transform is hessian else 2)
    assert calls_of(x64_session, lambda: derivative(rand(7))) == one
    assert calls_of(x64_session, lambda: vmap(derivative)(rand(20, 3))) == one


def test_integer_outputs_under_jvp(case: Callable[..., Any]) -> None:
    """Outputs of integers and booleans keep their values and have tangents of zero."""
    x = rand(5)
    outputs, tangents = jvp(
        lambda x: case("mixed outputs", x)[:3], (x,), (torch.full_like(x, 2.0),)
    )
    assert_same(outputs[1], x.exp())
    assert_same(tangents[1], 2 * x.exp())
    assert outputs[0] == x.argmax() and not outputs[0].is_floating_point()
    assert outputs[2].dtype == torch.bool and outputs[2].all()
    assert not (tangents[0].any() or tangents[2].any())


def test_integer_outputs_and_inputs_under_vmap(case: Callable[..., Any]) -> None:
    """Integers are batched like floats, whether they come or go, and grad passes over them."""
    x = rand(4, 5) - 0.7
    index, exponentials, signs = vmap(lambda x: case("mixed outputs", x)[:3])(x)
    assert torch.equal(index.long(), x.argmax(1)) and torch.equal(signs, x > 0)
    assert_same(exponentials, x.exp())
    rows = torch.tensor([[0, 1], [3, 3], [2, 0]])
    made = vmap(
        grad(lambda table, rows: case("embedding", table, rows).sum()),
        in_dims=(None, 0),
    )(rand(4, 2), rows)
    counts = torch.nn.functional.one_hot(rows, 4).sum(1).double()
    assert_same(made, 2 * counts[:, :, None].expand(3, 4, 2))


def complex_args(count: int) -> tuple[Tensor, ...]:
    return tuple(
        (rand(3, dtype=torch.complex128) * (1 + 0.5j) ** i).requires_grad_()
        for i in range(count)
    )


def test_complex_derivatives_have_torchs_convention(case: Callable[..., Any]) -> None:
    """Finite differences in torch's convention confirm the derivatives of complex functions, in
    both modes."""
    products = functools.partial(case, "complex products")
    assert gradcheck(
        products, complex_args(2), check_forward_ad=True, check_batched_grad=True
    )
    assert gradgradcheck(products, complex_args(2))


def test_complex_transforms(case: Callable[..., Any]) -> None:
    """grad, jvp and vmap(grad) of a complex function are those of the same function in torch."""

    def remote(z: Tensor, w: Tensor) -> Tensor:
        return (case("complex products", z, w)[0].abs() ** 2).sum()

    def twin(z: Tensor, w: Tensor) -> Tensor:
        return ((z * w.conj() + z.exp()).abs() ** 2).sum()

    args = tuple(z.detach() for z in complex_args(2))
    batch = tuple(torch.stack([z, z * 1j]) for z in args)
    assert_same(grad(remote, argnums=(0, 1))(*args), grad(twin, argnums=(0, 1))(*args))
    assert_same(vmap(grad(remote))(*batch), vmap(grad(twin))(*batch))
    assert_same(jvp(remote, args, args), jvp(twin, args, args))


def test_gradcheck_in_every_mode(case: Callable[..., Any]) -> None:
    """Finite differences confirm reverse, forward, batched, and second derivatives of each kind."""
    args = rand(3).requires_grad_(), rand(3).requires_grad_()
    sine = functools.partial(case, "sine")
    assert gradcheck(
        sine,
        args,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert gradgradcheck(
        sine,
        args,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
    )


def test_dual_tensors(case: Callable[..., Any]) -> None:
    """torch.autograd.forward_ad carries tangents through a remote function."""
    x = rand(3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.full_like(x, 2.0))
        made = forward_ad.unpack_dual(case("checkpoint", dual)).tangent
    assert_same(made, -2 * x.cos().cos() * x.sin())


def test_tensors_that_are_just_zero(x64_remote: Remote) -> None:
    """What forward mode makes without memory, a tensor that is known to be zero, is an argument
    like any other."""
    zero = torch._efficientzerotensor(3, dtype=torch.float64)
    sine = x64_remote("sine")
    for x in (rand(3), zero):
        assert_same(sine(x), 2 * x.sin())
    assert_same(
        jvp(sine, (rand(3),), (zero,)),
        (2 * rand(3).sin(), torch.zeros(3, dtype=torch.float64)),
    )


def test_functions_without_forward_mode(case: Callable[..., Any]) -> None:
    """Of a custom_vjp, jacrev(jacrev) gives the Hessian; forward mode raises JAX's error, which
    says what to do."""
    x = rand(3)
    expected = hessian(lambda x: (x.exp().log1p() * x).sum())(x)
    assert_same(jacrev(jacrev(lambda x: case("custom_vjp", x).sum()))(x), expected)
    for refused in (lambda f: jvp(f, (x,), (x,)), lambda f: hessian(f)(x)):
        with pytest.raises(
            RemoteModelError,
            match=r"(?s)forward-mode autodiff.*in .*jvp of .*jacrev\(jacrev\(f\)\)",
        ):
            refused(lambda x: case("custom_vjp", x).sum())


def test_functions_without_reverse_mode(x64_remote: Remote) -> None:
    """Of a while loop, forward mode gives the derivative; reverse mode raises JAX's error, which
    says what to do."""
    doubled, x = x64_remote("doubled_until_ten"), rand(3)
    made = jacfwd(doubled)(x)
    assert_same(made, torch.diag(doubled(x) / x))
    with pytest.raises(
        RemoteModelError,
        match=r"(?s)Reverse-mode differentiation.*in vjp of model.*jacfwd\(f\)",
    ):
        jacrev(doubled)(x)


_ADVICE = {
    "windowed": r"forward mode works: use torch\.func\.jvp or jacfwd\(f\)",
    "next_after": r"neither reverse nor forward mode works",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", _ADVICE)
def test_a_call_without_reverse_rule_says_what_works(
    any_lane: Remote, x64_remote: Remote, name: str, dtype: torch.dtype
) -> None:
    """Where an input requires a gradient that JAX cannot give, the error names torch.no_grad,
    detach and, where it works, forward mode; all of these do work.
    """
    made, x = (
        (any_lane if dtype == torch.float32 else x64_remote)(name),
        rand(3, dtype=dtype).requires_grad_(),
    )
    advice = rf"(?s)torch\.no_grad\(\).*x\.detach\(\).*{_ADVICE[name]}"
    with pytest.raises(RemoteModelError, match=advice):
        made(x)
    with torch.no_grad():
        assert_same(made(x), made(x.detach()))
    if name == "windowed":
        assert_same(
            jvp(made, (x.detach(),), (x.detach(),))[1], x.detach()[1:] + x.detach()[:-1]
        )


def test_a_pullback_without_rule_says_that_forward_mode_works(any_lane: Remote) -> None:
    """Where only the backward pass fails, its error recommends forward mode, which works."""
    made, x = any_lane("forward_only"), torch.ones(3, requires_grad=True)
    y = made(x)
    with pytest.raises(
        RemoteModelError, match=r"(?s)in the VJP of model.*forward mode works"
    ):
        y.sum().backward()
    assert_same(jvp(made, (x.detach(),), (torch.ones(3),))[1], torch.full((3,), 4.0))


def test_a_model_that_raises_gets_no_advice_about_derivatives(any_lane: Remote) -> None:
    """An error of the model itself is passed on without a word about derivatives."""
    with pytest.raises(RemoteModelError) as caught:
        any_lane("branch")(torch.ones(3, requires_grad=True), True, mode="none")
    assert "no_grad" not in str(caught.value)


def test_integers_are_refused_as_in_torch(x64_remote: Remote) -> None:
    """A derivative by integers is torch's error, before anything is sent."""
    product, i = x64_remote("product"), torch.arange(3)
    for refused in (
        lambda f: grad(lambda i: f(i).sum())(i),
        lambda f: jvp(f, (i,), (i,)),
        lambda f: jacrev(f)(i),
        lambda f: jacfwd(f)(i),
    ):
        with pytest.raises((RuntimeError, ValueError)) as of_torch:
            refused(lambda i: i * i)
        with pytest.raises(type(of_torch.value)) as of_remote:
            refused(lambda i: product(i, i))
        assert str(of_remote.value) == str(of_torch.value)


VMAPPED = {
    "unequal sizes": ((0, 0), lambda: (rand(3), rand(4))),
    "a number": ((0, 0), lambda: (rand(3), 2.0)),
    "a text": ((0, 0), lambda: (rand(3), "sine")),
    "a missing axis": ((2, None), lambda: (rand(3), rand(3))),
    "another structure": ((0,), lambda: (rand(3), rand(3))),
}


@pytest.mark.parametrize("wrong", VMAPPED)
def test_a_wrong_vmap_is_refused_as_in_torch(
    x64_session: Session, x64_remote: Remote, wrong: str
) -> None:
    """vmap over unequal sizes, over what is no tensor, or over an axis that is not there: torch's
    error, in its words, and no call.
    """
    in_dims, args = VMAPPED[wrong]
    product = x64_remote("product")

    def errors() -> Iterator[str]:
        for f in (lambda x, y: x * y, lambda x, y: product(x, y)):
            with pytest.raises(ValueError) as refused:
                vmap(f, in_dims=in_dims)(*args())
            yield re.sub(r"<function .*?at 0x\w+>", "f", str(refused.value))

    calls = x64_session.stats()["calls"]
    of_torch, of_remote = errors()
    assert of_torch == of_remote
    assert x64_session.stats()["calls"] == calls


def test_a_refused_signature_is_named_within_a_transform(x64_remote: Remote) -> None:
    """When a transformed call cannot be compiled, the error names the signature that the model
    was called with."""
    matmul = x64_remote("matmul")
    with pytest.raises(
        RemoteModelError,
        match=r"'matmul' called with \(args\[0\]: float64\[2,3\], args\[1\]: ",
    ):
        vmap(matmul)(rand(5, 2, 3), rand(5, 2, 3))


def test_randomness_beside_a_remote_function(x64_remote: Remote) -> None:
    """Random numbers that torch makes within a vmap are the same for each row, different, or an
    error, as vmap says."""
    product, x = x64_remote("product"), torch.ones(4, dtype=torch.float64)

    def noisy(x: Tensor) -> Tensor:
        return product(x, torch.rand((), dtype=torch.float64))

    assert len(set(vmap(noisy, randomness="same")(x).tolist())) == 1
    assert len(set(vmap(noisy, randomness="different")(x).tolist())) == 4
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(noisy)(x)


def test_double_and_batched_backward(
    x64_session: Session, case: Callable[..., Any]
) -> None:
    """create_graph differentiates a gradient again, and is_grads_batched takes a batch of
    cotangents in one call."""
    x = rand(3).requires_grad_()
    y = case("sine", x, x)
    batched = [
        torch.autograd.grad(
            y, x, torch.eye(3), is_grads_batched=True, retain_graph=True
        )[0]
        for _ in range(2)
    ]
    assert_same(batched, [jacrev(TWINS["sine"][1])(x.detach())] * 2)
    again = functools.partial(
        torch.autograd.grad, y, x, rand(9, 3), is_grads_batched=True, retain_graph=True
    )
    assert calls_of(x64_session, again) == 1
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert_same(
        torch.autograd.grad(first.sum(), x)[0], 2 * x.detach().cos() * x.detach().exp()
    )


def test_no_grad_within_transforms(case: Callable[..., Any]) -> None:
    """What torch.no_grad holds constant is so for each transform around it, and not only for the
    innermost."""

    def weighted(f: Function, x: Tensor) -> Tensor:
        with torch.no_grad():
            value, slope = f(x), grad(lambda x: f(x).sum())(x)
        return (f(x) * value * slope).sum()

    remote, local = (
        functools.partial(weighted, f)
        for f in (lambda x: case("sine", x, x), TWINS["sine"][1])
    )
    assert_same(jacrev(jacrev(remote))(rand(3)), jacrev(jacrev(local))(rand(3)))
    assert_same(vmap(hessian(remote))(rand(2, 3)), vmap(hessian(local))(rand(2, 3)))
    with torch.no_grad():
        assert_same(hessian(remote)(rand(3).requires_grad_()), hessian(local)(rand(3)))


def test_transforms_of_a_recorded_backward(
    x64_session: Session, case: Callable[..., Any]
) -> None:
    """torch.vmap of torch.autograd.grad, on a graph from before it, is one call; tangents of
    cotangents stay."""
    x, rows = rand(3).requires_grad_(), rand(9, 3)
    y = case("sine", x, x)

    def pull(cotangent: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, cotangent, retain_graph=True)[0]

    jacobian = jacrev(TWINS["sine"][1])(x.detach())
    assert calls_of(x64_session, lambda: torch.vmap(pull)(rows)) == 1
    assert_same(torch.vmap(pull)(rows), rows @ jacobian)
    assert_same(torch.vmap(pull, chunk_size=2)(rows), rows @ jacobian)
    assert_same(
        jvp(pull, (rows[0],), (rows[1],)), (rows[0] @ jacobian, rows[1] @ jacobian)
    )
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(pull(forward_ad.make_dual(rows[0], rows[1])))
        assert_same(dual.tangent, rows[1] @ jacobian)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_autograd_functional(case: Callable[..., Any], strategy: str) -> None:
    """torch.autograd.functional's jacobian and hessian, vectorized, are torch's."""
    twin = TWINS["sine"][1]
    x, options = rand(3), {"vectorize": True}
    seen = torch.autograd.functional.jacobian(
        lambda x: case("sine", x, x), x, strategy=strategy, **options
    )
    assert_same(seen, jacrev(twin)(x))
    seen = torch.autograd.functional.hessian(
        lambda x: case("sine", x, x).sum(),
        x,
        outer_jacobian_strategy=strategy,
        **options,
    )
    assert_same(seen, hessian(lambda x: twin(x).sum())(x))


def test_functional_call_and_ensembles(
    x64_session: Session, x64_remote: Remote
) -> None:
    """functional_call gives per-sample gradients by a model's parameters; vmap, an ensemble of
    models in one call."""
    model = x64_remote("affine").double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    x = rand(5, 3)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, weights, (x,)).sin().sum()

    def twin(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ weights["weight"] + weights["bias"]).sin().sum()

    seen, expected = (
        vmap(grad(f), in_dims=(None, 0))(weights, x) for f in (loss, twin)
    )
    assert_same(seen, expected)
    members, _ = stack_module_state([model, model])
    members = {
        name: (p * torch.tensor([1.0, 2.0]).view(2, *[1] * (p.dim() - 1))).detach()
        for name, p in members.items()
    }
    assert_same(
        vmap(loss, in_dims=(0, None))(members, x),
        vmap(twin, in_dims=(0, None))(members, x),
    )
    assert calls_of(x64_session, lambda: vmap(loss, in_dims=(0, None))(members, x)) == 1
