"""to_jax and to_torch: what shares memory, what is copied, and what is refused."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bridge_client.inproc import to_jax, to_torch
from bridge_wire.dtypes import BY_NAME, NEEDS_X64
from bridge_wire.errors import CopyNeeded, DTypeError, StructureError

LAYOUTS = {
    "row-major": lambda: torch.randn(2, 3, 4, 5),
    "transposed": lambda: torch.randn(3, 4).T,
    "permuted": lambda: torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(
        memory_format=torch.channels_last
    ),
    "scalar": lambda: torch.tensor(3.0),
    "axes of one": lambda: torch.randn(16, 1, 4).as_strided((16, 1, 4), (4, 999, 1)),
    "empty": lambda: torch.zeros(0, 3),
}
UNSHARABLE = {
    "gaps": lambda: torch.randn(4, 6)[:, ::2],
    "broadcast": lambda: torch.randn(1, 4).expand(3, 4),
    "unaligned": lambda: torch.randn(100)[1:],
    "conjugated": lambda: torch.randn(4, dtype=torch.complex64).conj(),
    "negated": lambda: torch._neg_view(torch.randn(4)),
}


class Pair(NamedTuple):
    first: Any
    second: Any


def pointer(array: jax.Array) -> int:
    return array.unsafe_buffer_pointer()


@pytest.mark.parametrize("name", list(BY_NAME))
def test_every_dtype_is_shared_in_both_directions(name: str) -> None:
    """Every dtype that both frameworks have keeps its bits, and its memory, on the way to JAX
    and back."""
    tensor = (
        torch.arange(64, dtype=torch.uint8)
        .repeat(BY_NAME[name].itemsize)
        .view(getattr(torch, name))
    )
    if name == "bool":
        tensor = torch.arange(64) % 3 == 0
    with jax.enable_x64(name in NEEDS_X64):
        array = to_jax(tensor, copy=False)
        back = to_torch(array, copy=False)
    assert (str(array.dtype), back.dtype) == (name, tensor.dtype)
    assert pointer(array) == tensor.data_ptr() == back.data_ptr()
    assert np.asarray(array).tobytes() == bytes(tensor.view(torch.uint8).tolist())


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_compact_layouts_are_shared(layout: str) -> None:
    """A tensor whose elements have no gaps shares its memory, whatever the order of its axes."""
    tensor = LAYOUTS[layout]()
    array = to_jax(tensor, copy=False)
    assert pointer(array) == tensor.data_ptr() or tensor.numel() == 0
    np.testing.assert_array_equal(np.asarray(array), tensor.numpy())
    back = to_torch(array, copy=False)
    assert back.data_ptr() == tensor.data_ptr() or tensor.numel() == 0
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("layout", list(UNSHARABLE))
def test_other_layouts_are_copied(layout: str) -> None:
    """What XLA cannot read in place is copied, with the same values; copy=False then raises
    CopyNeeded."""
    tensor = UNSHARABLE[layout]()
    np.testing.assert_array_equal(
        np.asarray(to_jax(tensor)), tensor.resolve_conj().resolve_neg().numpy()
    )
    with pytest.raises(CopyNeeded, match="copy=None") as caught:
        to_jax({"w": [tensor]}, copy=False)
    assert isinstance(caught.value, ValueError)
    assert "['w'][0]" in str(caught.value)


def test_shared_memory_shows_what_is_written() -> None:
    """An array without a copy shows later writes into its tensor; one with a copy does not."""
    tensor = torch.zeros(64)
    shared, copied = to_jax(tensor), to_jax(tensor, copy=True)
    tensor.fill_(1.0)
    assert (float(shared[0]), float(copied[0])) == (1.0, 0.0)
    assert pointer(copied) != tensor.data_ptr()


def test_copies_of_arrays_can_be_written() -> None:
    """A tensor made with copy=True shares nothing with its array."""
    array = jnp.zeros(64)
    copied = to_torch(array, copy=True)
    copied.fill_(1.0)
    assert float(array.sum()) == 0.0
    assert to_torch(array).data_ptr() == pointer(array) != copied.data_ptr()


def test_shared_memory_outlives_its_first_owner() -> None:
    """Memory lives as long as the tensor or the array does, whichever dies last."""
    array = to_jax(torch.full((4096,), 3.0))
    tensor = to_torch(jnp.full(4096, 4.0))
    torch.zeros(4096)
    assert (float(array.sum()), float(tensor.sum())) == (3 * 4096, 4 * 4096)


def test_structures_keep_their_form() -> None:
    """Pytrees keep their containers, and leaves that are neither tensors nor arrays stay as they
    are."""
    other = object()
    tree = {
        "pair": Pair(torch.ones(2), [torch.zeros(3), None]),
        "ordered": collections.OrderedDict(b=torch.ones(1), a="text"),
        "numbers": (1, 2.5, True, other, np.ones(2)),
        "array": jnp.ones(2),
    }
    made = to_jax(tree)
    assert isinstance(made["pair"], Pair)
    assert isinstance(made["pair"].second[0], jax.Array)
    assert list(made["ordered"]) == ["b", "a"]
    assert made["numbers"][:4] == (1, 2.5, True, other)
    assert made["numbers"][4] is tree["numbers"][4]
    assert made["array"] is tree["array"]
    back = to_torch(made)
    assert torch.equal(back["pair"].first, tree["pair"].first)
    assert isinstance(back["array"], Tensor)


def test_a_state_dict_becomes_arrays() -> None:
    """A module's state_dict, or its parameters under no_grad, become arrays that share their
    memory."""
    module = torch.nn.Linear(3, 2)
    state = to_jax(module.state_dict())
    assert pointer(state["weight"]) == module.weight.data_ptr()
    with torch.no_grad():
        assert (
            pointer(to_jax(dict(module.named_parameters()))["bias"])
            == module.bias.data_ptr()
        )


def test_64_bit_integers_are_narrowed_if_they_fit() -> None:
    """Without x64, int64 and uint64 become 32 bits wide where their values allow it; with x64
    they stay."""
    for dtype, narrow in ((torch.int64, "int32"), (torch.uint64, "uint32")):
        array = to_jax(torch.tensor([0, 7], dtype=dtype))
        assert (str(array.dtype), array.tolist()) == (narrow, [0, 7])
        with pytest.raises(CopyNeeded):
            to_jax(torch.tensor([1], dtype=dtype), copy=False)
        with jax.enable_x64(True):
            assert str(to_jax(torch.tensor([1], dtype=dtype)).dtype) == str(
                dtype
            ).removeprefix("torch.")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([2**31]),
        torch.tensor([-(2**31) - 1]),
        torch.tensor([2**32], dtype=torch.uint64),
        torch.tensor([2**63 + 1], dtype=torch.uint64),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.complex128),
    ],
    ids=str,
)
def test_nothing_is_narrowed_with_loss(tensor: Tensor) -> None:
    """Without x64, 64-bit floats, and integers that do not fit, raise DTypeError that names the
    remedy."""
    with pytest.raises(DTypeError, match="jax_enable_x64"):
        to_jax(tensor)


def test_a_gradient_is_not_lost_in_silence() -> None:
    """A tensor that requires a gradient is refused while gradients are recorded, and passes
    detached."""
    tensor = torch.ones(2, requires_grad=True)
    with pytest.raises(StructureError, match="detach"):
        to_jax(tensor)
    assert pointer(to_jax(tensor.detach())) == tensor.data_ptr()


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(2).to_sparse(), "sparse"),
        (lambda: torch.zeros(2, device="meta"), "no memory"),
        (lambda: torch.zeros(2, dtype=torch.complex32), "complex32"),
        (lambda: FakeTensorMode().from_tensor(torch.zeros(2)), "is tracing"),
    ],
    ids=["sparse", "meta", "half complex", "fake"],
)
def test_tensors_without_a_counterpart_are_refused(
    make: Callable[[], Tensor], message: str
) -> None:
    """A tensor that JAX cannot have is refused with the reason."""
    with pytest.raises((StructureError, DTypeError), match=message):
        to_jax(make())


def test_transformed_tensors_are_refused() -> None:
    """A tensor inside torch.func.vmap has no memory of its own."""
    with pytest.raises(StructureError):
        torch.func.vmap(to_jax)(torch.ones(2, 3))


def test_arrays_without_a_counterpart_are_refused() -> None:
    """A traced or deleted array, PRNG keys, and dtypes that torch lacks are refused with the
    reason."""
    deleted = jnp.ones(2)
    deleted.delete()
    with pytest.raises(StructureError, match="deleted"):
        to_torch(deleted)
    with pytest.raises(DTypeError, match="key_data"):
        to_torch(jax.random.key(0))
    with pytest.raises(DTypeError, match="int4"):
        to_torch(jnp.zeros(2, jnp.int4))
    with pytest.raises(StructureError, match="traced"):
        jax.jit(to_torch)(jnp.ones(2))
