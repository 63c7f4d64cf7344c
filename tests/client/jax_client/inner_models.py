"""Torch modules that differentiate inside forward, or compute parts again. No jax."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Maml(nn.Module):
    """The loss after one step of gradient descent by its own parameters."""

    def __init__(self, create_graph=True):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(()))
        self.register_buffer("scale", torch.tensor(2.0))
        self.create_graph = create_graph

    def loss(self, w, b, x):
        return ((torch.sin(self.scale * (x @ w)) + b) ** 2).mean()

    def forward(self, x):
        loss = self.loss(self.w, self.b, x)
        dw, db = torch.autograd.grad(
            loss, [self.w, self.b], create_graph=self.create_graph
        )
        return self.loss(self.w - 0.1 * dw, self.b - 0.1 * db, x)


class Penalty(Maml):
    """The gradient's norm, by `backward`."""

    def forward(self, x):
        with torch.enable_grad():
            loss = self.loss(self.w, self.b, x)
            loss.backward(inputs=[self.w], create_graph=True)
            gradient, self.w.grad = self.w.grad, None
        return (gradient**2).sum() + self.b


class Reentrant(nn.Module):
    """Two parts that are computed again, the first of an argument alone."""

    is_reentrant = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 3)

    def part(self, x):
        return torch.tanh(self.outer(torch.tanh(self.inner(x))))

    def forward(self, x):
        for _ in range(2):
            x = checkpoint(self.part, x, use_reentrant=self.is_reentrant)
        return (x**2).sum()


class NotReentrant(Reentrant):
    is_reentrant = False


maml, first_order, penalty = Maml(), Maml(create_graph=False), Penalty()
reentrant, not_reentrant = Reentrant(), NotReentrant()
