"""The torch models of these tests, beside those of tests/server/torch_server; runs in .venv-torch.

Tests import it too, for what torch itself says.
"""

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F


def affine(x, w):
    """Two inputs, and a batch only in the caller's mind."""
    return torch.tanh(w @ x) * x.sum()


def two_results(x, y):
    """Two results, of which one depends on both inputs."""
    return x.sin() * y, y.exp()


def cross_entropy(logits, labels):
    """Wants 64-bit labels, as all of torch does."""
    return F.cross_entropy(logits, labels)


def embedded(table, tokens, scale=1.0, *, shift=None, squared=False):
    """Integers in, and what is static."""
    rows = table[tokens] * scale
    rows = rows if shift is None else rows + shift
    return {
        "rows": rows**2 if squared else rows,
        "tokens": tokens + 1,
        "is_first": tokens == 0,
    }


def echo(tree):
    """Returns what it is given."""
    return tree


def repeated(x, times):
    """Its structure depends on a number."""
    return [x * (i + 1) for i in range(int(times))]


def widened(x):
    """Returns a 64-bit float whatever it is given."""
    return x.double()


def counted(x):
    """Returns an integer that 32 bits do not hold."""
    return x.sum().long() + 2**40


def between_ten_and_eleven(x, scale=1.0):
    """Raises on the values that the bridge makes up."""
    total = float(x.sum() * scale)
    if not 10 < total < 11:
        raise ValueError(f"the sum is {total}")
    return torch.sin(x) * scale


def along(y, t):
    """Euler's steps, at increasing times only."""
    if not (t[1:] > t[:-1]).all():
        raise ValueError("t must increase")
    steps = [y]
    for dt in t[1:] - t[:-1]:
        steps.append(steps[-1] + dt * torch.sin(steps[-1]))
    return torch.stack(steps)


def raises_below_zero(x):
    """Raises depending on values."""
    if (x < 0).any():
        raise ValueError("there is a negative value")
    return x.sqrt()


class _FailingBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, cotangent):
        raise LookupError("no way back")


def fails_backwards(x):
    """Has a value, and an error for a gradient."""
    return _FailingBackwards.apply(x)


def _made(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def _perceptron(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


perceptron = _made(lambda: _perceptron().double())
single = _made(_perceptron)
batch_norm = _made(
    lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
)


class Transformer(nn.Module):
    """Tokens in, an encoder and a decoder layer that attends to it, logits out."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, batch_first=True
        )
        self.decoder = nn.TransformerDecoderLayer(
            8, 2, 16, dropout=0.0, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(8, 11)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(
            target.shape[1], dtype=self.head.weight.dtype
        )
        memory = self.encoder(self.tokens(source))
        return self.head(self.decoder(self.tokens(target), memory, tgt_mask=mask))


transformer = _made(lambda: Transformer().double())


# Methods ------------------------------------------------------------------------------------------


class Coder(nn.Module):
    """An autoencoder that counts its encodings, with a hook on its encoder."""

    count: torch.Tensor

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 2)
        self.decoder = nn.Linear(2, 4)
        self.register_buffer("count", torch.zeros(()))
        self.encoder.register_forward_hook(lambda *args: args[-1] * 2)
        self.last = None

    def forward(self, x):
        return self.decode(self.encode(x))

    def encode(self, x, power=1):
        """The power is static: Python counts with it."""
        self.count += 1
        self.last = x
        for _ in range(power):
            x = torch.tanh(x)
        return self.encoder(x)

    def decode(self, z):
        return self.decoder(z)

    def noisy(self, x):
        return nn.functional.dropout(x, 0.5)

    def half(self):
        """Overrides a method of nn.Module: not a model's."""

    def _secret(self, x):
        return x


coder = _made(Coder)
encode = coder.encode


# Classes ------------------------------------------------------------------------------------------


def _state_class():
    """A class; all of these have one name and the same fields."""

    @dataclasses.dataclass
    class State:
        x: torch.Tensor
        y: torch.Tensor

    return State


FirstState, SecondState = _state_class(), _state_class()


def first_state(x):
    return FirstState(x, 2 * x)


def second_state(x):
    return SecondState(x, 3 * x)


def class_of_state(state):
    """Which of the classes an instance has: 1 or 2; 0: neither."""
    return state.x.new_tensor(
        isinstance(state, FirstState) + 2 * isinstance(state, SecondState)
    )


def state_with_more(x):
    """An instance with an attribute that is no field."""
    state = FirstState(x, x)
    state.more = 3
    return state


def some_state(x):
    """An instance of another class where the values say so."""
    return FirstState(x, x) if x.sum() > 0 else SecondState(x, x)
