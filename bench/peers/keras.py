"""Keras on TensorFlow, in its own layout (batch first), inside a `tf.function`."""

from __future__ import annotations

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from bench.cases import GATES, Case
from bench.problem import Answer, Problem, problem

# Keras keeps (z, r, h) of a GRU, PyTorch (r, z, n).
_BLOCKS = {"rnn": [0], "gru": [1, 0, 2], "lstm": [0, 1, 2, 3]}


def _to_keras(cell: str, H: int, weight: np.ndarray) -> np.ndarray:
    """A weight (G*H, n) or bias (G*H,) in the order of Keras."""
    blocks = weight.reshape(GATES[cell], H, -1)[_BLOCKS[cell]]
    return blocks.reshape(weight.shape)


def _layer(case: Case, cell: str, dtype: str, threads: int) -> tuple[Any, Problem]:
    # May be said again, but not changed, once it is in use.
    if tf.config.threading.get_intra_op_parallelism_threads() != threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    given = problem(case, cell, dtype)
    p = {key: _to_keras(cell, case.H, value) for key, value in given.params.items()}
    kind = {"rnn": keras.layers.SimpleRNN, "gru": keras.layers.GRU, "lstm": keras.layers.LSTM}
    layer = kind[cell](case.H, return_sequences=True, dtype=dtype)
    layer.build((case.B, case.T, case.I))
    bias = p["bias_ih_l0"] + p["bias_hh_l0"]
    if cell == "gru":
        bias = np.stack([p["bias_ih_l0"], p["bias_hh_l0"]])
    layer.set_weights([p["weight_ih_l0"].T, p["weight_hh_l0"].T, bias])
    return layer, given


def _by_time(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.swapaxes(0, 1))


def training(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """forward and backward under a gradient tape."""
    layer, given = _layer(case, cell, dtype, threads)
    x, d_y = tf.constant(_by_time(given.x)), tf.constant(_by_time(given.d_y))

    @tf.function
    def compiled(x: Any, d_y: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        weights = [w.value for w in layer.trainable_weights]
        return y, tape.gradient(y, [x, *weights], d_y)

    def step() -> Any:
        y, found = compiled(x, d_y)
        # Operations may still be under way.
        found[-1].numpy()
        return y, found

    def read(result: Any) -> Answer:
        y, (d_x, d_kernel, d_recurrent, d_bias) = result
        back = np.argsort(_BLOCKS[cell])

        def rows(array: np.ndarray) -> np.ndarray:
            blocks = array.reshape(GATES[cell], case.H, -1)[back]
            return blocks.reshape(array.shape)

        two = d_bias.numpy() if cell == "gru" else np.stack([d_bias.numpy()] * 2)
        grads = {
            "weight_ih_l0": rows(d_kernel.numpy().T),
            "weight_hh_l0": rows(d_recurrent.numpy().T),
            "bias_ih_l0": rows(two[0]),
            "bias_hh_l0": rows(two[1]),
        }
        return {"y": y.numpy().swapaxes(0, 1), "d_x": d_x.numpy().swapaxes(0, 1), **grads}

    return step, read


def inference(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """forward, its weights constants of the graph."""
    layer, given = _layer(case, cell, dtype, threads)
    x = tf.constant(_by_time(given.x))
    compiled = tf.function(lambda x: layer(x, training=False)).get_concrete_function(x)
    frozen = convert_variables_to_constants_v2(compiled)
    return lambda: frozen(x)[0].numpy(), lambda y: {"y": y.swapaxes(0, 1)}
