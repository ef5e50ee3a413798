"""ONNX Runtime: inference with the LSTM, GRU and RNN operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from bench.cases import GATES, Case
from bench.peers import Missing
from bench.problem import Answer, problem

# ONNX keeps (z, r, h) of a GRU and (i, o, f, c) of an LSTM.
_BLOCKS = {"rnn": [0], "gru": [1, 0, 2], "lstm": [0, 3, 1, 2]}


def training(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """None."""
    raise Missing("inference only")


def inference(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """One operator, through a session."""
    if dtype != "float32":
        raise Missing("float32 only")
    given = problem(case, cell, dtype)

    def blocks(key: str) -> np.ndarray:
        value = given.params[key].reshape(GATES[cell], case.H, -1)[_BLOCKS[cell]]
        return value.reshape(given.params[key].shape)

    bias = np.concatenate([blocks("bias_ih_l0"), blocks("bias_hh_l0")])
    weights = {"W": blocks("weight_ih_l0"), "R": blocks("weight_hh_l0"), "B": bias}
    options: dict[str, Any] = {"hidden_size": case.H}
    if cell == "gru":
        options["linear_before_reset"] = 1
    node = helper.make_node(cell.upper(), ["x", *weights], ["y"], **options)
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, given.x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (case.T, 1, case.B, case.H))],
        [numpy_helper.from_array(value[None], name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"x": given.x})[0], lambda y: Answer(y[:, 0])
