"""Grammar of the random programs: tables of statements in torch and in jax.numpy.

Imports no framework. A rule's text is one or more lines of Python: `{out}` is the new value, `{a}`
and `{b}` are earlier values. A rule's `shape` maps the earlier values' shapes to the new shape, or
to None if the rule does not apply.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    text: str
    shape: Callable[..., Shape | None]
    needs_key: bool = False

    @property
    def arity(self) -> int:
        return 2 if "{b}" in self.text else 1


def same(a: Shape) -> Shape:
    return a


def alike(a: Shape, b: Shape) -> Shape | None:
    return a if a == b else None


def broadcast(a: Shape, b: Shape) -> Shape | None:
    longest = max(len(a), len(b))
    one, two = ((1,) * (longest - len(x)) + x for x in (a, b))
    if any(m != n and 1 not in (m, n) for m, n in zip(one, two, strict=True)):
        return None
    return tuple(map(max, one, two))


def product(a: Shape, b: Shape) -> Shape | None:
    return (a[0], b[0]) if len(a) == len(b) == 2 and a[1] == b[1] else None


def last_dropped(a: Shape) -> Shape | None:
    return a[:-1] if a else None


def first_dropped(a: Shape) -> Shape | None:
    return a[1:] if a else None


def flat(a: Shape) -> Shape:
    size = 1
    for n in a:
        size *= n
    return (size,)


def transposed(a: Shape) -> Shape | None:
    return (a[1], a[0]) if len(a) == 2 else None


def shortened(a: Shape) -> Shape | None:
    return (*a[:-1], a[-1] - 1) if a and a[-1] > 1 else None


def ranked(a: Shape) -> Shape | None:
    return a or None


def long(a: Shape) -> Shape | None:
    return a if a and a[-1] > 1 else None


def square(a: Shape) -> Shape | None:
    return a if len(a) == 2 and a[0] == a[1] else None


def matrix(a: Shape) -> Shape | None:
    return a if len(a) == 2 else None


def scalar(a: Shape) -> Shape:
    return ()


def widened(a: Shape) -> Shape:
    return (2, *a)


def doubled(a: Shape) -> Shape | None:
    return (*a[:-1], 2 * a[-1]) if a and flat(a)[0] <= 32 else None


def _rules(
    shape: Callable[..., Shape | None], *texts: str, needs_key: bool = False
) -> Sequence[Rule]:
    return [
        Rule(text if "{out}" in text else "{out} = " + text, shape, needs_key)
        for text in texts
    ]


# The statements of both frameworks, with F for torch or jnp.
_COMMON = [
    *_rules(
        same,
        "F.sin({a})",
        "F.cos({a})",
        "F.tanh({a})",
        "F.exp(-{a} * {a})",
        "F.log1p({a} * {a})",
    ),
    *_rules(
        same,
        "F.sqrt({a} * {a} + 1)",
        "F.abs({a})",
        "F.square({a})",
        "F.arctan({a})",
        "-{a}",
    ),
    # Python numbers on either side.
    *_rules(
        same,
        "{a} * 0.5",
        "2 - {a}",
        "{a} + 1",
        "{a} / 3.0",
        "{a} ** 2",
        "1 / ({a} * {a} + 1)",
        "0.25 + {a}",
    ),
    *_rules(
        same,
        "{a} * float({a}.ndim + 1)",
        "2.0 ** F.tanh({a})",
        "F.where({a} > 0.1, {a}, 0.3 * {a})",
    ),
    *_rules(
        broadcast,
        "{a} + {b}",
        "{a} - {b}",
        "{a} * {b}",
        "F.maximum({a}, {b})",
        "F.minimum({a}, 0.5 * {b})",
    ),
    *_rules(
        broadcast,
        "F.arctan2({a}, {b} * {b} + 1)",
        "{a} / ({b} * {b} + 2)",
        "F.where({a} < {b}, {a}, {b})",
    ),
    *_rules(
        scalar,
        "{a}.sum()",
        "{a}.mean()",
        "({a} * {a}).sum() * 0.5",
        "F.sqrt(({a} * {a}).sum() + 1)",
    ),
    *_rules(
        last_dropped,
        "{a}.sum(-1)",
        "{a}.mean(-1)",
        "({a} * {a}).mean(-1)",
        "{a}[..., 0]",
    ),
    *_rules(first_dropped, "{a}.sum(0)", "{a}[0]", "{a}[-1]"),
    *_rules(shortened, "{a}[..., 1:]", "{a}[..., :-1] * {a}[..., 1:]", "F.diff({a})"),
    *_rules(flat, "{a}.reshape(-1)", "F.ravel({a})"),
    *_rules(transposed, "{a}.T", "F.swapaxes({a}, 0, 1)"),
    *_rules(product, "{a} @ {b}.T", "F.einsum('ik,jk->ij', {a}, {b})"),
    *_rules(ranked, "F.cumsum({a}, 0)", "F.flip({a}, (0,))", "F.roll({a}, 1)"),
    *_rules(widened, "F.stack(({a}, F.cos({a})))", "F.stack(({a}, {a}))"),
    *_rules(square, "F.tril({a})", "F.diag(F.diag({a}))"),
]

TORCH = [
    *[Rule(rule.text.replace("F.", "torch."), rule.shape) for rule in _COMMON],
    *_rules(
        same,
        "torch.sigmoid({a})",
        "torch.erf({a})",
        "F.softplus({a})",
        "F.gelu({a})",
        "{a}.clamp(-1, 1)",
    ),
    *_rules(
        same,
        "F.relu({a}) * 0.5 + {a}.detach()",
        "{a}.pow(3)",
        "torch.pow(2.0, {a}.clamp(max=2))",
    ),
    *_rules(
        same,
        "{a} * {a}.numel()",
        "torch.lerp({a}, {a}.cos(), 0.3)",
        "{a}.to(torch.float64).sin().float()",
    ),
    *_rules(
        ranked,
        "{a}.softmax(-1)",
        "{a}.logsumexp(-1, keepdim=True) + {a}",
        "F.layer_norm({a}, {a}.shape[-1:])",
    ),
    *_rules(
        last_dropped,
        "{a}.amax(-1)",
        "{a}.max(-1).values",
        "{a}.sort(-1).values[..., 0]",
        "{a}.norm(dim=-1)",
    ),
    *_rules(
        long,
        "{a} - {a}.var(-1, keepdim=True)",
        "torch.cat(({a}[..., :1], {a}[..., 1:] * 2), -1)",
    ),
    *_rules(
        ranked, "{a} * torch.arange({a}.shape[-1])", "{a} + torch.ones({a}.shape[-1])"
    ),
    *_rules(
        ranked,
        "{a} * torch.linspace(0.5, 1, {a}.shape[-1])",
        "{a}.index_select(-1, torch.tensor([0]))+ {a}",
    ),
    *_rules(square, "{a} + torch.eye({a}.shape[0])"),
    *_rules(
        same,
        "{a} * torch.tensor(0.75)",
        "{a} + torch.tensor(3)",
        "torch.full_like({a}, 0.2) * {a}",
    ),
    # Views.
    *_rules(
        same, "{a}.unsqueeze(0).squeeze(0)", "{a}.contiguous().view(-1).view({a}.shape)"
    ),
    *_rules(
        widened,
        "{a}.expand(2, *{a}.shape)",
        "{a}.unsqueeze(0).repeat(2, *[1] * {a}.ndim)",
    ),
    *_rules(matrix, "{a}.t().contiguous().t()", "{a}.permute(1, 0).permute(1, 0)"),
    *_rules(doubled, "torch.cat(({a}, {a}.sin()), -1)"),
    *_rules(
        shortened,
        "{a}.narrow(-1, 0, {a}.shape[-1] - 1)",
        "torch.split({a}, {a}.shape[-1] - 1, -1)[0]",
    ),
    # In-place writes: whole tensors, slices, other views, under no_grad.
    *_rules(
        same,
        "{out} = {a}.clone()\n{out}.mul_(2)",
        "{out} = {a} * 1\n{out}.add_({a}, alpha=0.5)",
    ),
    *_rules(
        same,
        "{out} = {a}.sin()\n{out}.view(-1)[:1].fill_(0.5)",
        "{out} = {a}.clone()\n{out} += 1",
    ),
    *_rules(
        ranked,
        "{out} = {a}.clone()\n{out}[0] = 0.5",
        "{out} = {a}.clone()\n{out}[..., :1].zero_()",
    ),
    *_rules(
        ranked,
        "{out} = {a} + 0\n{out}[0] *= 3",
        "{out} = {a}.clone()\n{out}.select(0, 0).mul_({a}[-1])",
    ),
    *_rules(
        ranked,
        "{out} = torch.zeros_like({a})\n{out}[..., 0] = {a}[..., 0]",
        "{out} = {a}.clone()\n{out}[{a} > 0] = 0",
    ),
    *_rules(
        matrix,
        "{out} = {a}.clone()\n{out}.t().mul_(0.5)",
        "{out} = {a}.clone()\n{out}.diagonal().add_(1)",
    ),
    *_rules(
        alike,
        "{out} = {a}.clone()\n{out}.copy_({b})",
        "{out} = {a}.clone()\n{out}.mul_({b}).add_({b})",
    ),
    *_rules(alike, "{out} = torch.empty_like({a})\n{out}.copy_({a})\n{out}.sub_({b})"),
    *_rules(
        ranked, "{out} = {a}.clone()\n{out}.index_add_(0, torch.tensor([0]), {a}[-1:])"
    ),
    *_rules(same, "{out} = {a}.clone()\n{out}.masked_fill_({a} > 0.5, 0.5)"),
    *_rules(
        same,
        "with torch.no_grad():\n    {out}c = {a}.exp()\n{out} = {a} * ({out}c + 1).reciprocal()",
    ),
    *_rules(scalar, "{out} = torch.zeros(())\n{out} += {a}.sum() * 2"),
    # Random numbers.
    *_rules(same, "F.dropout({a}, 0.4)", "{a} * torch.rand_like({a})", needs_key=True),
    *_rules(same, "{a} + 0.1 * torch.randn({a}.shape)", needs_key=True),
]

JAX = [
    *[Rule(rule.text.replace("F.", "jnp."), rule.shape) for rule in _COMMON],
    *_rules(
        same,
        "jax.nn.sigmoid({a})",
        "jax.nn.softplus({a})",
        "jax.nn.gelu({a})",
        "jnp.clip({a}, -1, 1)",
    ),
    *_rules(
        same,
        "jax.lax.stop_gradient({a}) * {a}",
        "jax.nn.relu({a})",
        "{a} * {a}.size",
        "jnp.sinc({a})",
    ),
    *_rules(
        ranked,
        "jax.nn.softmax({a})",
        "{a} * jnp.arange({a}.shape[-1])",
        "jnp.sort({a})",
        "{a}.at[0].set(0.5)",
    ),
    *_rules(
        ranked,
        "{a}.at[..., :1].add({a}[..., -1:])",
        "{a}.at[0].multiply(2)",
        "{a}[{a}.argsort(0)[0]].sum(0) + {a}",
    ),
    *_rules(
        last_dropped,
        "{a}.max(-1)",
        "jnp.linalg.norm({a}, axis=-1)",
        "jax.nn.logsumexp({a}, axis=-1)",
    ),
    *_rules(
        last_dropped,
        "jnp.take_along_axis({a}, {a}.argmax(-1, keepdims=True), -1)[..., 0]",
    ),
    *_rules(
        ranked,
        "jax.lax.scan(lambda c, x: (0.5 * c + x, jnp.sin(c)), {a}[0] * 0, {a})[1]",
    ),
    *_rules(
        ranked,
        "jax.vmap(jnp.sin)({a})",
        "jax.lax.map(jnp.tanh, {a})",
        "jax.lax.cumlogsumexp({a})",
    ),
    *_rules(
        same,
        "jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x) + i, {a})",
        "jax.checkpoint(jnp.sin)({a})",
    ),
    *_rules(
        same,
        "jax.lax.cond({a}.sum() > 0, jnp.sin, jnp.cos, {a})",
        "jax.grad(lambda x: jnp.sin(x).sum())({a})",
    ),
    *_rules(
        same,
        "{a} * jax.random.uniform(jax.random.key(3), {a}.shape)",
        "jnp.float32(0.75) * {a}",
    ),
    *_rules(
        same,
        "jnp.where(jax.random.bernoulli(jax.random.key(5), 0.6, {a}.shape), {a} / 0.6, 0)",
    ),
    *_rules(
        square,
        "{a} + jnp.eye({a}.shape[0])",
        "jnp.linalg.inv({a} @ {a}.T + 3 * jnp.eye({a}.shape[0]))",
    ),
    *_rules(
        widened,
        "jnp.broadcast_to({a}, (2, *{a}.shape))",
        "jnp.tile({a}, (2, *[1] * {a}.ndim))",
    ),
    *_rules(doubled, "jnp.concatenate(({a}, jnp.sin({a})), -1)"),
    *_rules(alike, "jax.lax.select({a} > {b}, {a}, {b})", "jnp.hypot({a}, {b})"),
    *_rules(
        long, "jnp.convolve({a}.ravel(), jnp.ones(3), mode='same').reshape({a}.shape)"
    ),
]
