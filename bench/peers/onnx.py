"""ONNX Runtime: inference with the LSTM, GRU and RNN operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from bench.cases import GATES, Case
from bench.peers import Missing
from bench.problem import Problem, problem

# ONNX keeps (z, r, h) of a GRU and (i, o, f, c) of an LSTM.
_BLOCKS = {"rnn": [0], "gru": [1, 0, 2], "lstm": [0, 3, 1, 2]}


def _node(case: Case, cell: str, dtype: str, states: list[str]) -> tuple[Any, list, Problem]:
    """The operator and its weights; `states` are given to it and come out of it by these names."""
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
    inputs = ["x", *weights, *([""] if states else []), *states]
    node = helper.make_node(
        cell.upper(), inputs, ["y", *(f"{state}_after" for state in states)], **options
    )
    return node, [numpy_helper.from_array(v[None], name) for name, v in weights.items()], given


def _session(node: Any, weights: list, inputs: dict, outputs: dict, threads: int) -> Any:
    """Of one node; inputs and outputs by their shapes."""

    def values(shapes: dict) -> list:
        return [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in shapes.items()]

    graph = helper.make_graph([node], "layer", values(inputs), values(outputs), weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )


def inference(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """One operator, through a session."""
    node, weights, given = _node(case, cell, dtype, [])
    y = (case.T, 1, case.B, case.H)
    session = _session(node, weights, {"x": given.x.shape}, {"y": y}, threads)
    return lambda: session.run(None, {"x": given.x})[0], lambda y: {"y": y[:, 0]}


def stepping(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """The operator with one step, its states in and out."""
    states = ["h", "c"] if cell == "lstm" else ["h"]
    node, weights, given = _node(case, cell, dtype, states)
    one = (1, case.B, case.H)
    inputs = {"x": (1, case.B, case.I)} | dict.fromkeys(states, one)
    outputs = {"y": (1, *one)} | {f"{state}_after": one for state in states}
    session = _session(node, weights, inputs, outputs, threads)
    x = list(given.x[:, None])
    zero = np.zeros(one, dtype)

    def step() -> list:
        after, ys = [zero] * len(states), []
        for x_t in x:
            found = session.run(None, {"x": x_t, **dict(zip(states, after, strict=True))})
            ys.append(found[0])
            after = found[1:]
        return ys

    return step, lambda ys: {"y": np.concatenate(ys)[:, 0]}
