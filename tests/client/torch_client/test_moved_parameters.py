"""Parameters whose memory is replaced, resized or refilled by somebody else: each call uses the
current values."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters, weight_norm
from torch.nn.utils.prune import l1_unstructured

from bridge_client import Session, connect
from bridge_client.inproc import host
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import SpecError
from tests.client.torch_client.conftest import Remote
from tests.client.torch_client.functions import affine
from tests.workers import run_program, start_program

Poke = Callable[[], object]


class Affine(nn.Module):
    """The remote model "affine" in torch."""

    def __init__(self, remote: nn.Module) -> None:
        super().__init__()
        for name, value in remote.named_parameters():
            setattr(self, name, nn.Parameter(value.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.fixture(params=["float32", "float64", "float32 in process"])
def pair(
    request: pytest.FixtureRequest, remote: Remote, x64_remote: Remote
) -> Iterator[tuple[RemoteJaxFunction, Affine]]:
    """A remote model, and the same in torch."""
    if request.param == "float32 in process":
        with host(jax_model=affine) as session:
            model = RemoteJaxFunction(session)
            yield model, Affine(model)
        return
    model = (
        remote("affine")
        if request.param == "float32"
        else x64_remote("affine").double()
    )
    yield model, Affine(model)


def swap_tensors(model: nn.Module) -> Poke:
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 2))
    return lambda: None


def assign_data(model: nn.Module) -> Poke:
    held = [parameter.detach() * 2 for parameter in model.parameters()]
    for parameter, value in zip(model.parameters(), held, strict=True):
        parameter.data = value
    return lambda: [value.mul_(3) for value in held]


def set_source(model: nn.Module) -> Poke:
    held = [parameter.detach() * 2 for parameter in model.parameters()]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), held, strict=True):
            parameter.set_(value)
    return lambda: [value.mul_(3) for value in held]


def set_storage(model: nn.Module) -> Poke:
    """Keep only the storages, as Python objects."""
    storages = []
    for parameter in model.parameters():
        parameter.data = parameter.detach() * 2
        storages.append(parameter.untyped_storage())
    return lambda: [storage.fill_(0) for storage in storages]


def export_to_numpy(model: nn.Module) -> Poke:
    arrays = []
    for parameter in model.parameters():
        parameter.data = parameter.detach() * 2
        arrays.append(parameter.detach().numpy())

    def write() -> None:
        for array in arrays:
            array[...] *= 3

    return write


def free_and_refill(model: nn.Module) -> Poke:
    """As sharding and offloading do: the storage has no memory between two uses."""
    for parameter in model.parameters():
        parameter.data = parameter.detach().clone()
        storage, value = parameter.untyped_storage(), parameter.detach() * 2
        nbytes = storage.nbytes()
        storage.resize_(0)
        storage.resize_(nbytes)
        parameter.data.copy_(value)
    return lambda: None


def fill_empty(model: nn.Module) -> Poke:
    model.to_empty(device="cpu")
    for i, parameter in enumerate(model.parameters(), 1):
        nn.init.constant_(parameter, i)
    return lambda: None


def assign_state(model: nn.Module) -> Poke:
    state = {name: value * 2 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return lambda: [value.mul_(3) for value in state.values()]


def view_a_vector(model: nn.Module) -> Poke:
    vector = parameters_to_vector(model.parameters()).detach() * 2
    vector_to_parameters(vector, model.parameters())
    return lambda: vector.mul_(3)


def view_one_vector_each(model: nn.Module) -> Poke:
    """The vector's storage is just as large as the parameter."""
    vectors = []
    for parameter in model.parameters():
        vectors.append(parameter.detach().reshape(-1) * 2)
        vector_to_parameters(vectors[-1], [parameter])
    return lambda: [vector.mul_(3) for vector in vectors]


def replace_by_name(model: nn.Module) -> Poke:
    for name, parameter in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(parameter.detach() * 2))
    return lambda: None


def convert_by_swapping(model: nn.Module) -> Poke:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        dtype = next(model.parameters()).dtype
        model.bfloat16().to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    return lambda: None


MOVES = [
    *(
        swap_tensors,
        assign_data,
        set_source,
        set_storage,
        export_to_numpy,
        free_and_refill,
        fill_empty,
    ),
    *(
        assign_state,
        view_a_vector,
        view_one_vector_each,
        replace_by_name,
        convert_by_swapping,
    ),
]


def outcome(model: nn.Module) -> list[Tensor]:
    """Return the output and the gradients of one forward and backward."""
    x = (
        torch.linspace(-1, 1, 12, dtype=next(model.parameters()).dtype)
        .reshape(4, 3)
        .requires_grad_()
    )
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(each.grad.clone() for each in (x, model.bias, model.weight))]


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize(
    "is_called_before", [False, True], ids=["new", "called before"]
)
def test_the_current_values_are_used(
    pair: tuple[RemoteJaxFunction, Affine],
    move: Callable[[nn.Module], Poke],
    is_called_before: bool,
) -> None:
    """After a move, a write by another owner of the memory, and a step, outputs and gradients
    are torch's."""
    if is_called_before:
        torch.testing.assert_close(*map(outcome, pair))
    pokes = [move(model) for model in pair]
    torch.testing.assert_close(*map(outcome, pair))
    for poke in pokes:
        poke()
    torch.testing.assert_close(*map(outcome, pair))
    for model in pair:
        torch.optim.SGD(model.parameters(), lr=0.01).step()
    torch.testing.assert_close(*map(outcome, pair))
    torch.testing.assert_close(*(model.state_dict() for model in pair))


def test_a_copied_view_stays_a_view(pair: tuple[RemoteJaxFunction, Affine]) -> None:
    """What deepcopy makes of a model and a view of its parameter share memory, as the originals
    do."""
    results = []
    for model in pair:
        copied, view = copy.deepcopy((model, model.bias.detach()))
        outcome(copied)
        view.fill_(5)
        results.append(outcome(copied))
    torch.testing.assert_close(*results)


def test_values_given_for_one_call_are_followed(
    pair: tuple[RemoteJaxFunction, Affine],
) -> None:
    """torch.func.functional_call uses the current values of nn.Parameters, and leaves their
    memory in place."""
    results = []
    for model in pair:
        memory = {name: value.detach() * 2 for name, value in model.named_parameters()}
        given = {name: nn.Parameter(value) for name, value in memory.items()}
        x = torch.ones(2, 3, dtype=memory["bias"].dtype)
        seen = [torch.func.functional_call(model, given, (x,)).detach()]
        for value in memory.values():
            value.mul_(3)
        seen.append(torch.func.functional_call(model, given, (x,)).detach())
        results.append([*seen, given["bias"].detach()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("nbytes", [0, 4], ids=["freed", "shrunk"])
@pytest.mark.parametrize(
    "is_transposed", [False, True], ids=["row-major", "transposed"]
)
def test_a_parameter_without_memory_is_an_error_naming_it(
    remote: Remote, nbytes: int, is_transposed: bool
) -> None:
    """A storage that is smaller than its parameter is refused before it is read."""
    model = remote("affine")
    value = model.weight.detach().clone()
    model.weight.data = value.mT.contiguous().mT if is_transposed else value
    outcome(model)
    model.weight.untyped_storage().resize_(nbytes)
    with pytest.raises(
        SpecError, match=rf"`weight` has a storage of {nbytes} bytes, and needs 24"
    ):
        outcome(model)


def test_memory_of_the_session_cannot_be_freed(remote: Remote) -> None:
    """The storage of a parameter in the session's memory refuses to be resized, and keeps its
    values."""
    model = remote("affine")
    before = outcome(model)
    with pytest.raises(RuntimeError, match="not resizable"):
        model.weight.untyped_storage().resize_(0)
    torch.testing.assert_close(outcome(model), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("hook", ["prune", "weight_norm"])
def test_hooks_on_a_branch_compute_its_parameters(remote: Remote, hook: str) -> None:
    """A weight that a hook of a submodule computes from others follows these at each call, with
    their gradients."""
    model = remote("perceptron")
    dense = model.params.Dense_0
    plain = {name: value.detach().clone() for name, value in model.named_parameters()}
    if hook == "prune":
        l1_unstructured(dense, "kernel", amount=0.5)
        scaled = dense.kernel_orig
    else:
        weight_norm(dense, "kernel")
        scaled = dense.kernel_g
    with torch.no_grad():
        scaled.mul_(3)
    x = torch.ones(2, 3)
    kernel = plain["params.Dense_0.kernel"] * 3
    if hook == "prune":
        kernel = kernel * dense.kernel_mask
    hidden = torch.tanh(x @ kernel + plain["params.Dense_0.bias"])
    expected = hidden @ plain["params.Dense_1.kernel"] + plain["params.Dense_1.bias"]
    y = model(x)
    torch.testing.assert_close(y.detach(), expected)
    y.sum().backward()
    assert scaled.grad is not None and scaled.grad.ne(0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_residual_in_process_does_not_read_freed_memory(dtype: torch.dtype) -> None:
    """Where an input's storage is freed after the forward and refilled elsewhere, gradients are
    those of its values."""
    with (
        jax.enable_x64(True),
        host(jax_model={"multiply": lambda x, w: x * w}) as session,
    ):
        x, w = (torch.rand(1 << 16, dtype=dtype).requires_grad_() for _ in range(2))
        values = x.detach().clone()
        y = RemoteJaxFunction(session)(x, w)
        storage, nbytes = x.untyped_storage(), x.nbytes
        with torch.autograd._unsafe_preserve_version_counter(x), torch.no_grad():
            storage.resize_(0)
            others = [torch.full_like(values, torch.nan) for _ in range(4)]
            storage.resize_(nbytes)
            x.copy_(values)
        y.sum().backward()
        assert others
        torch.testing.assert_close([x.grad, w.grad], [w.detach(), values])


# Sharded ------------------------------------------------------------------------------------------

_MODULE = "tests.client.torch_client.sharded_training"


@contextlib.contextmanager
def _ranks(directory: Path, address: str, venv: str) -> Iterator[list[Any]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                start_program(
                    f"from {_MODULE} import run_rank; run_rank()",
                    *(str(rank), str(directory), address),
                    venv=venv,
                    GLOO_SOCKET_IFNAME="lo",
                )
            )
            for rank in range(2)
        ]


@pytest.mark.parametrize("where", ["worker", "in process"])
def test_two_ranks_that_shard_train_as_torch_modules_do(
    tmp_path: Path, x64_worker: Session, where: str
) -> None:
    """Under fully_shard, around the model, a parent and with mixed precision, weights are those
    of torch modules."""
    address, venv = (
        (x64_worker.address, ".venv-torch") if where == "worker" else ("", ".venv-both")
    )
    with _ranks(tmp_path, address, venv) as ranks:
        for rank in ranks:
            _, stderr = rank.communicate(timeout=180)
            assert rank.returncode == 0, stderr
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert len(seen) == 4
        for kind, (remote, plain) in seen.items():
            tolerance = 0.05 if "bfloat16" in kind else 1e-10
            torch.testing.assert_close(
                remote,
                plain,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, k=kind: f"{k}: {m}",
            )


def test_a_sharded_parameter_is_an_error_naming_it(jax_worker: Session) -> None:
    """A DTensor that no hook has gathered is refused by name, wherever it comes from."""
    with connect(jax_worker.address) as session:
        done = run_program(
            f"from {_MODULE} import refuse; refuse()",
            session.address,
            venv=".venv-torch",
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["branch", "distributed", "unhooked", "argument"]
