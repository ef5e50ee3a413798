"""The layers against PyTorch's: outputs, states, gradients, and weights that move both ways."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    DTYPES,
    agree,
    as_parts,
    as_state,
    compare,
    computed,
    each_dtype,
    make_problem,
    new_layer,
    same,
)

import fastrnn
from fastrnn import loss, optim

torch = pytest.importorskip("torch")

# Those that PyTorch has.
each_cell = pytest.mark.parametrize("cell", ["gru", "lstm", "rnn_relu", "rnn_tanh"])
SHAPES = [(1, 1, 1, 1), (7, 3, 4, 5), (3, 8, 17, 16), (12, 1, 5, 33), (2, 13, 3, 64)]


def torch_layer(rnn, **options):
    """torch.nn's layer of the same kind, with the same weights."""
    if isinstance(rnn, fastrnn.RNN):
        options["nonlinearity"] = rnn.nonlinearity
    twin = getattr(torch.nn, type(rnn).__name__)(
        rnn.input_size,
        rnn.hidden_size,
        rnn.num_layers,
        bias=rnn.bias,
        batch_first=rnn.batch_first,
        dtype=getattr(torch, str(rnn.dtype)),
        **options,
    )
    twin.load_state_dict({k: torch.tensor(v) for k, v in rnn.params.items()})
    return twin


def leaf(array):
    return torch.tensor(array, requires_grad=True)


def by_torch(problem):
    """The arrays of `computed`, by torch.nn and autograd in float64."""
    twin = torch_layer(problem.rnn).double()
    rnn = problem.rnn
    if problem.x.dtype.kind == "i":
        x = leaf(np.eye(rnn.input_size)[problem.x])
    else:
        x = leaf(problem.x.astype(np.float64))
    state = [leaf(s.astype(np.float64)) for s in problem.state]
    output, final = twin(x, as_state(state))
    final = as_parts(final)
    objective = (output * torch.tensor(problem.d_output)).sum()
    for s, d_s in zip(final, problem.d_state, strict=True):
        objective = objective + (s * torch.tensor(d_s)).sum()
    objective.backward()
    results = {"output": output}
    results |= {f"final {name}": s for name, s in zip(problem.names, final, strict=True)}
    results |= {f"d initial {name}": s.grad for name, s in zip(problem.names, state, strict=True)}
    if problem.x.dtype.kind == "f":
        results["d x"] = x.grad
    results |= {key: value.grad for key, value in twin.named_parameters()}
    return {key: value.detach().numpy() for key, value in results.items()}


@each_cell
@each_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("tokens", [False, True], ids=["dense", "tokens"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_array(cell, dtype, bias, tokens, num_layers, shape):
    problem = make_problem(
        cell, *shape, layers=num_layers, bias=bias, tokens=tokens, dtype=dtype, seed=1
    )
    compare(problem, computed(problem), by_torch(problem))


def gradients(rnn, x, state, d_output):
    output, final, saved = rnn.forward(x, state)
    d_x, d_state, grads = rnn.backward(saved, d_output)
    return output, as_parts(final), d_x, as_parts(d_state), grads


def torch_gradients(twin, x, state, d_output):
    x, parts = leaf(x), [leaf(s) for s in as_parts(state)]
    output, final = twin(x, as_state(parts))
    (output * torch.tensor(d_output)).sum().backward()
    grads = {key: value.grad for key, value in twin.named_parameters()}
    return output, as_parts(final), x.grad, [s.grad for s in parts], grads


@each_cell
@each_dtype
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
def test_layouts(cell, dtype, batched, batch_first):
    T, B, n_in, H = 5, 3, 4, 7
    problem = make_problem(cell, T, B, n_in, H, layers=2, dtype=dtype, batch_first=batch_first)
    rnn, twin = problem.rnn, torch_layer(problem.rnn)
    x, d_output, state = problem.x, problem.d_output, problem.state
    if not batched:
        x, d_output, state = x[:, 0], d_output[:, 0], tuple(s[:, 0] for s in state)
    elif batch_first:
        x, d_output = x.swapaxes(0, 1), d_output.swapaxes(0, 1)
    got = gradients(rnn, x, as_state(state), d_output)
    want = torch_gradients(twin, x, as_state(state), d_output)
    for found, tensors in zip(got, want, strict=True):
        if isinstance(found, dict):
            assert found.keys() == tensors.keys()
            pairs = [(found[key], tensors[key]) for key in found]
        elif isinstance(found, tuple):
            pairs = list(zip(found, tensors, strict=True))
        else:
            pairs = [(found, tensors)]
        for array, tensor in pairs:
            # Both round in float32, so that their errors add up.
            agree(array, tensor.detach().numpy(), dtype, 4 * problem.terms)


@each_cell
@each_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_state_dicts_move_both_ways(cell, dtype, bias):
    ours, other = (new_layer(cell, 3, 5, 2, bias=bias, dtype=dtype, seed=s) for s in (0, 1))
    theirs = torch_layer(other)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.params) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        same(ours.params[key], value.numpy())
    back = torch_layer(other)
    for parameter in back.parameters():
        torch.nn.init.zeros_(parameter)
    back.load_state_dict({key: torch.from_numpy(v) for key, v in ours.state_dict().items()})
    for key, value in back.state_dict().items():
        same(value.numpy(), other.params[key])


@each_dtype
def test_tensors_are_arrays(dtype):
    problem = make_problem("gru", 3, 2, 4, 5, dtype=dtype)
    output, _ = problem.rnn(torch.tensor(problem.x))
    same(output, problem.rnn(problem.x)[0])
    with pytest.raises(TypeError, match="x: expected an array, got Tensor"):
        problem.rnn(leaf(problem.x))


@each_dtype
@pytest.mark.parametrize("lead", [(), (1,), (6,), (5, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_linear(dtype, lead, bias, rng):
    ours = fastrnn.Linear(19, 7, bias, dtype=dtype, seed=0)
    theirs = torch.nn.Linear(19, 7, bias, dtype=torch.float64)
    theirs.load_state_dict({k: torch.tensor(v) for k, v in ours.params.items()})
    x, d_y = (rng.standard_normal((*lead, size)).astype(dtype) for size in (19, 7))
    y, saved = ours.forward(x)
    d_x, grads = ours.backward(saved, d_y)
    x_t = leaf(x.astype(np.float64))
    y_t = theirs(x_t)
    (y_t * torch.tensor(d_y)).sum().backward()
    agree(y, y_t.detach().numpy(), dtype, 19)
    agree(d_x, x_t.grad.numpy(), dtype, 7)
    assert list(grads) == list(theirs.state_dict())
    for key, value in theirs.named_parameters():
        agree(grads[key], value.grad.numpy(), dtype, 15)
    ours.load_state_dict(theirs.state_dict())


@each_dtype
@pytest.mark.parametrize("lead", [(1,), (6,), (5, 3)], ids=str)
def test_embedding(dtype, lead, rng):
    ours = fastrnn.Embedding(4, 19, dtype=dtype, seed=0)
    theirs = torch.nn.Embedding(4, 19, dtype=torch.float64)
    theirs.load_state_dict({k: torch.tensor(v) for k, v in ours.params.items()})
    ids, d_y = rng.integers(4, size=lead), rng.standard_normal((*lead, 19)).astype(dtype)
    y, saved = ours.forward(ids)
    grads = ours.backward(saved, d_y)
    y_t = theirs(torch.tensor(ids))
    (y_t * torch.tensor(d_y)).sum().backward()
    same(y, y_t.detach().numpy().astype(dtype))
    agree(grads["weight"], theirs.weight.grad.numpy(), dtype, 15)


@each_dtype
@pytest.mark.parametrize("scale", [1, 30])
@pytest.mark.parametrize("ignore_index", [None, -100, 2])
def test_softmax_cross_entropy(dtype, scale, ignore_index, rng):
    logits = (rng.standard_normal((4, 6, 19)) * scale).astype(dtype)
    targets = rng.integers(19, size=(4, 6))
    targets[0, :2] = 3 if ignore_index is None else ignore_index
    got, d_logits = loss.softmax_cross_entropy(logits, targets, ignore_index=ignore_index)
    logits_t = leaf(logits.reshape(24, 19).astype(np.float64))
    options = {} if ignore_index is None else {"ignore_index": ignore_index}
    want = torch.nn.functional.cross_entropy(logits_t, torch.tensor(targets.reshape(24)), **options)
    want.backward()
    agree(np.array(got, dtype), np.array(want.item()), dtype, 19)
    agree(d_logits.reshape(24, 19), logits_t.grad.numpy(), dtype, 19)


@each_dtype
@pytest.mark.parametrize("scale", [1, 30])
def test_logistic_loss(dtype, scale, rng):
    logits = (rng.standard_normal((4, 6)) * scale).astype(dtype)
    targets = rng.random((4, 6)).astype(dtype)
    got, d_logits = loss.logistic_loss(logits, targets)
    logits_t = leaf(logits.astype(np.float64))
    want = torch.nn.functional.binary_cross_entropy_with_logits(
        logits_t, torch.tensor(targets).double()
    )
    want.backward()
    agree(np.array(got, dtype), np.array(want.item()), dtype, 24)
    agree(d_logits, logits_t.grad.numpy(), dtype, 24)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "torch_name", "options"),
    [
        ("sgd", "SGD", {}),
        ("sgd", "SGD", {"momentum": 0.9, "weight_decay": 0.1}),
        ("rmsprop", "RMSprop", {}),
        ("adagrad", "Adagrad", {}),
        ("adam", "Adam", {"weight_decay": 0.1}),
        ("adamw", "AdamW", {"betas": (0.5, 0.8)}),
    ],
    ids=str,
)
def test_optimisers(dtype, name, torch_name, options, rng):
    params = {"w": rng.standard_normal((4, 5)).astype(dtype)}
    p_t = torch.nn.Parameter(torch.tensor(params["w"]).double())
    ours = optim.OPTIMIZERS[name](params, lr=0.05, **options)
    theirs = getattr(torch.optim, torch_name)([p_t], lr=0.05, **options)
    for _ in range(10):
        g = rng.standard_normal((4, 5)).astype(dtype)
        p_t.grad = torch.tensor(g).double()
        theirs.step()
        ours.step({"w": g})
    agree(params["w"], p_t.detach().numpy(), dtype, 100)


@each_dtype
@pytest.mark.parametrize("norm_type", [2.0, np.inf])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_grad_norm(dtype, norm_type, max_norm, rng):
    from fastrnn.clip import clip_grad_norm_

    grads = {key: rng.standard_normal((4, 5)).astype(dtype) for key in "ab"}
    parameters = [torch.nn.Parameter(torch.zeros(4, 5, dtype=torch.float64)) for _ in grads]
    for parameter, g in zip(parameters, grads.values(), strict=True):
        parameter.grad = torch.tensor(g).double()
    want = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
    got = clip_grad_norm_(grads, max_norm, norm_type)
    agree(np.array(got), want.numpy(), np.float64, 40)
    for parameter, g in zip(parameters, grads.values(), strict=True):
        agree(g, parameter.grad.numpy(), dtype, 40)


def test_default_arguments_are_torchs():
    for name in ("RNN", "GRU", "LSTM"):
        ours = getattr(fastrnn, name)(3, 4)
        theirs = getattr(torch.nn, name)(3, 4)
        for attribute in ("num_layers", "bias", "batch_first", "dropout"):
            assert getattr(ours, attribute) == getattr(theirs, attribute)
        shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
        assert {key: value.shape for key, value in ours.params.items()} == shapes
        # Positions too: RNN's fourth is the nonlinearity, as in torch.
        rest = ("relu", False, True) if name == "RNN" else (False, True)
        again, twin = (
            getattr(fastrnn, name)(3, 4, 2, *rest),
            getattr(torch.nn, name)(3, 4, 2, *rest),
        )
        assert (again.bias, again.batch_first) == (twin.bias, twin.batch_first) == (False, True)
