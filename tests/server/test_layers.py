"""keras models and penzai layers served with their parameters, where these packages are
installed."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge_server.jax_runtime import JaxRuntime
from bridge_server.runtime import Options
from bridge_wire.errors import CallerError, TargetError
from bridge_wire.pb import bridge_pb2 as pb
from tests.runtimes import Hosted, vjp

X = np.arange(6, dtype=np.float32).reshape(2, 3) / 4


def hosted(target: Any) -> Hosted:
    return Hosted(JaxRuntime(Options(embedded=True)), target)


def values(model: Hosted) -> list[np.ndarray]:
    return list(map(np.asarray, model.model.values))


def paths(model: Hosted, *, trainable: bool) -> list[str]:
    parameters = model.model.parameters
    return [each.path for each in parameters if each.trainable is trainable]


# keras --------------------------------------------------------------------------------------------


@pytest.fixture
def keras(monkeypatch: pytest.MonkeyPatch) -> Any:
    """keras on JAX."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    return pytest.importorskip("keras")


def network(keras: Any) -> Any:
    layers = keras.layers
    parts = [layers.Dense(4), layers.BatchNormalization(), layers.Dense(2)]
    return keras.Sequential([layers.Input((3,)), *parts], name="network")


def test_keras_variables_are_parameters_and_buffers(keras: Any) -> None:
    """Trainable variables are parameters by their paths, and moving statistics buffers."""
    model = network(keras)
    served = hosted(model)
    assert len(paths(served, trainable=True)) == len(model.trainable_variables)
    buffers = paths(served, trainable=False)
    assert [path.rpartition(".")[2] for path in buffers] == [
        "moving_mean",
        "moving_variance",
    ]
    program = served.call(X, parameters=True)
    (y,) = served.run(program, *values(served), X)
    np.testing.assert_allclose(y, model(X), rtol=1e-5)


def test_keras_parameters_have_gradients(keras: Any) -> None:
    """The VJP in the last bias is the sum of the cotangents."""
    served = hosted(network(keras))
    position = [p.spec.shape for p in served.model.parameters].index((2,))
    transforms = [vjp([position])]
    program = served.call(X, parameters=True, transforms=transforms)
    cotangent = np.ones((2, 2), np.float32)
    (gradient,) = served.run(program, *values(served), X, cotangent)
    assert gradient.tolist() == [2.0, 2.0]


def test_keras_statistics_follow_training(keras: Any) -> None:
    """A mutable call in training mode returns the statistics that keras computes."""
    model = network(keras)
    served = hosted(model)
    before = [variable.value for variable in model.non_trainable_variables]
    trained = [variable.value for variable in model.trainable_variables]
    y, after = model.stateless_call(trained, before, jnp.asarray(X), training=True)
    call = served.described(X, parameters=True, mutable=True)
    call.mode = pb.MODE_TRAINING
    seen, *buffers = served.run(served.prepared(call), *values(served), X)
    np.testing.assert_allclose(seen, y, rtol=1e-5)
    for buffer, expected in zip(buffers, after, strict=True):
        np.testing.assert_allclose(buffer, expected, rtol=1e-5)


def test_keras_dropout_without_changing_seeds_is_refused(keras: Any) -> None:
    """A call that would draw the same numbers each time is a CallerError."""
    dropping = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dropout(0.5)])
    served = hosted(dropping)
    call = served.described(X, parameters=True)
    call.mode = pb.MODE_TRAINING
    with pytest.raises(CallerError, match="mutable=True"):
        served.prepared(call)
    call.mode = pb.MODE_INFERENCE
    (y,) = served.run(served.prepared(call), *values(served), X)
    assert y.tolist() == X.tolist()


def test_keras_methods_share_the_weights(keras: Any) -> None:
    """A method of the user's class is served; those of keras.Model are not."""

    class Coder(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.coder = keras.layers.Dense(2)

        def call(self, x: Any) -> Any:
            return self.encode(x) * 2

        def encode(self, x: Any) -> Any:
            return self.coder(x)

    model = Coder()
    with pytest.raises(TargetError, match="call it once"):
        hosted(model)
    model(X)
    served = hosted(model)
    assert list(served.model.methods) == ["__call__", "encode"]
    call = served.described(X, parameters=True)
    call.mode = pb.MODE_TRAINING  # which this model does not take
    (y,) = served.run(served.prepared(call), *values(served), X)
    call.method = "encode"
    (z,) = served.run(served.prepared(call), *values(served), X)
    np.testing.assert_allclose(y, 2 * z, rtol=1e-6)


# penzai -------------------------------------------------------------------------------------------


@pytest.fixture
def counting() -> Any:
    """A penzai layer around a perceptron that counts its calls."""
    pz = pytest.importorskip("penzai.pz")
    mlp = pytest.importorskip("penzai.models.simple_mlp").MLP

    @pz.pytree_dataclass
    class Counting(pz.nn.Layer):  # type: ignore[name-defined]
        inner: Any
        count: Any

        def __call__(self, x: Any, /, **side_inputs: Any) -> Any:
            self.count.value = self.count.value + 1
            return self.encode(x)

        def encode(self, x: Any) -> Any:
            y = self.inner(pz.nx.wrap(x).tag("batch", "features"))
            return y.unwrap("batch", "features")

    key = jax.random.key(0)
    inner = mlp.from_config(name="mlp", init_base_rng=key, feature_sizes=[3, 4, 2])
    return Counting(inner, pz.StateVariable(value=jnp.zeros(()), label="count"))


def test_penzai_variables_are_parameters_and_buffers(counting: Any) -> None:
    """Parameters have their labels as paths; a StateVariable is a buffer that a call changes."""
    served = hosted(counting)
    assert "mlp.Affine_0.Linear.weights" in paths(served, trainable=True)
    assert paths(served, trainable=False) == ["count"]
    program = served.call(X, parameters=True, mutable=True)
    y, count = served.run(program, *values(served), X)
    np.testing.assert_allclose(y, counting.encode(X), rtol=1e-5)
    assert count == 1 and counting.count.value == 0


def test_penzai_methods_share_the_parameters(counting: Any) -> None:
    """A method of the user's layer has the parameters, and gradients in them."""
    served = hosted(counting)
    assert list(served.model.methods) == ["__call__", "encode"]
    labels = [parameter.path for parameter in served.model.parameters]
    position = labels.index("mlp.Affine_1.AddBias.bias")
    call = served.described(X, parameters=True)
    call.method = "encode"
    call.transforms.append(vjp([position]))
    cotangent = np.ones((2, 2), np.float32)
    (gradient,) = served.run(served.prepared(call), *values(served), X, cotangent)
    assert gradient.tolist() == [2.0, 2.0]
