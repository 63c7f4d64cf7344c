"""A residual network with BatchNorm and dropout, and its training in JAX alone. No torch.

`python -m tests.client.torch_client.resnet DATA.npz RESULT.npz` trains it in the worker's
environment.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

LEARNING_RATE = 4e-3


class Block(nn.Module):
    """Two convolutions and a way around them."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train):
        norm = lambda: nn.BatchNorm(use_running_average=not train, momentum=0.8)  # noqa: E731
        y = nn.relu(
            norm()(nn.Conv(self.features, (3, 3), self.stride, use_bias=False)(x))
        )
        y = nn.Dropout(0.2, deterministic=not train)(y)
        y = norm()(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if y.shape != x.shape:
            x = norm()(nn.Conv(self.features, (1, 1), self.stride, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """For images of 8 by 8 and ten classes."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(8, (3, 3))(x[..., None]))
        x = Block(16, stride=2)(x, train)
        x = Block(16)(x, train)
        return nn.Dense(10)(x.reshape(len(x), -1))


def resnet():
    """Make the model, for --factory. Its variables are NumPy's, since `init` would compile."""
    module, rng = ResNet(), np.random.default_rng(2)

    def initial(path, leaf):
        if path[-1].key == "kernel":
            return (
                rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
            ).astype(np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    shapes = jax.eval_shape(
        lambda key: module.init(key, jnp.zeros((1, 8, 8)), train=False),
        jax.random.key(0),
    )
    return module, jax.tree_util.tree_map_with_path(initial, shapes)


def train(images, labels, batches, keys):
    """Return the variables after the training, and the losses.

    The n-th batch draws from the n-th key.
    """
    module, variables = resnet()
    optimizer = optax.adam(LEARNING_RATE)

    def loss_of(params, statistics, x, y, key):
        stream = jax.random.fold_in(
            jax.random.wrap_key_data(key), np.uint32(_CRC32_OF_DROPOUT)
        )
        logits, after = module.apply(
            {"params": params, **statistics},
            x,
            train=True,
            rngs={"dropout": stream},
            mutable=["batch_stats"],
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), after

    @jax.jit
    def step(params, statistics, state, x, y, key):
        (loss, after), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            params, statistics, x, y, key
        )
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), after, state, loss

    params, statistics = variables["params"], {"batch_stats": variables["batch_stats"]}
    state, losses = optimizer.init(params), []
    for batch, key in zip(batches, keys, strict=True):
        params, statistics, state, loss = step(
            params, statistics, state, images[batch], labels[batch], key
        )
        losses.append(loss)
    return {"params": params, **statistics}, np.asarray(losses)


_CRC32_OF_DROPOUT = 0x9289EFC9  # zlib.crc32(b"dropout")


if __name__ == "__main__":
    data = np.load(sys.argv[1])
    trained, losses = train(
        data["images"], data["labels"], data["batches"], data["keys"]
    )
    classes = jax.jit(lambda x: ResNet().apply(trained, x, train=False))(
        data["tested"]
    ).argmax(1)
    np.savez(sys.argv[2], losses=losses, classes=classes)
