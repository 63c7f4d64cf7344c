"""The torch models that the tests' workers host; runs in .venv-torch. Tests import it too, for what
torch itself says.

Those with the names of models in tests/models.py do the same.
"""

import os
import time
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

# Sessions and faults ------------------------------------------------------------------------------


def sine(x):
    """Twice the sine."""
    return torch.sin(x) * 2


def square(x):
    """The square: its residual is its input."""
    return x * x


def outer(x):
    """A large output from a small input."""
    return x[:, None] * x[None, :]


def total(x):
    """A small output from a large input."""
    return x.sum()


def refusing(x):
    """Raises for all values."""
    raise ValueError(f"no arrays of shape {tuple(x.shape)} here")


def failing(x):
    """Raises where a value is not zero."""
    if (x != 0).any():
        raise ValueError(f"the value {x} is not to my taste")
    return x


def gated(x, gate, when="forward"):
    """Twice the input; the forward or the backward pass waits until the file `gate` exists."""
    return _Gated.apply(x, gate, when)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, when):
        ctx.gate = gate if when == "backward" else None
        if when == "forward":
            _pass(gate, x)
        return x * 2

    @staticmethod
    def backward(ctx, cotangent):
        if ctx.gate:
            _pass(ctx.gate, cotangent)
        return cotangent * 2, None, None


def _pass(gate, x):
    """Say so beside the gate, and wait until it opens.

    Forgotten tests must not keep a worker for ever.
    """
    if isinstance(x, FakeTensor):
        return
    Path(f"{gate}.waiting").touch()
    deadline = time.monotonic() + 60
    while not os.path.exists(gate):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody opened {gate}")
        time.sleep(0.002)


def square_factory():
    """Makes a model, for --factory."""
    return square


# Transforms ---------------------------------------------------------------------------------------


def smooth(x):
    """From a vector to a vector, with derivatives of every order."""
    return torch.tanh(x * x.sin()) * x.sum()


class _OldStyle(torch.autograd.Function):
    """As everybody wrote them before torch.func: without setup_context."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * cotangent


def old_style(x):
    """The cube of the sine, by an autograd.Function that torch.func cannot look into."""
    return _OldStyle.apply(x.sin())


def complex_power(z, w):
    """A function of two complex numbers, of which one is conjugated."""
    return z**2 * w.conj()


def structured(tree, scale=1.0):
    """Takes and returns dicts and lists."""
    hidden = torch.tanh(tree["x"] @ tree["weights"][0]) * scale
    return {"hidden": hidden, "aux": [hidden.sum(), hidden.argmax(), None]}


# Code that is not a function ----------------------------------------------------------------------


def in_place(x):
    """Writes into its input, through a view of it too."""
    x[0] = 0
    x.data.mul_(2)
    return x.add_(1).sin()


def by_value(x):
    """Looks at values: it cannot be traced, and changes its input in one case only."""
    if x.sum() > 0:
        x.mul_(3)
    return x + 1


def growing(x):
    """Its output's shape depends on the values."""
    return {"found": x[x > 0]}


def summed(x):
    return {"total": float(x.sum()), "x": x}


def numeral(x):
    """Returns an object that is not a tensor."""
    return {"loss": x.sum(), "count": len(x)}


def forces(x):
    """Differentiates inside."""
    x = x.requires_grad_()
    energy = (x**4).sum()
    return torch.autograd.grad(energy, x, create_graph=True)[0]


# Modules ------------------------------------------------------------------------------------------


def _made(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


class Tied(nn.Module):
    """One weight at two places, and a parameter that is not trained."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 4, bias=False)
        self.decoder = nn.Linear(4, 4, bias=False)
        self.decoder.weight = self.encoder.weight
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, x):
        return self.decoder(torch.tanh(self.encoder(x))) * self.scale


class Residual(nn.Module):
    """A block of a ResNet."""

    def __init__(self, channels, stride):
        super().__init__()
        out = channels * stride
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.short = (
            nn.Conv2d(channels, out, 1, stride, bias=False)
            if stride > 1
            else nn.Identity()
        )

    def forward(self, x):
        hidden = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(hidden)) + self.short(x))


class Attention(nn.Module):
    """A small vision transformer: patches, one layer of attention, a head."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.layer(tokens).mean(1))


tied = _made(Tied)
resnet = _made(
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), Residual(4, 1), Residual(4, 2))
).eval()
vit = _made(Attention)
normed = _made(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
dropped = _made(lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
recurrent = _made(lambda: nn.LSTM(3, 4, batch_first=True))


def _affine(params, x):
    """Takes its parameters as a dict."""
    return torch.tanh(x @ params["w"]) + params["inner"]["b"]


pair = _affine, {"w": torch.eye(3).double(), "inner": {"b": torch.ones(3).double()}}
