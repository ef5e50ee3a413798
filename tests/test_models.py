from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from helpers import agree, as_parts, as_state, frozen, same, same_results, threads

from fastrnn import models
from fastrnn.dropout import dropout
from fastrnn.models import CELL_NAMES, LanguageModel, model_from_config
from fastrnn.reference import CELLS
from fastrnn.reference.linear import (
    embedding_backward,
    embedding_forward,
    linear_backward,
    linear_forward,
)
from fastrnn.reference.loss import softmax_cross_entropy

V, H, E, T, B = 5, 3, 2, 4, 2

each_cell = pytest.mark.parametrize("cell", CELL_NAMES)
each_embedding = pytest.mark.parametrize("embedding", [0, E], ids=["tokens", "embedding"])
each_dropout = pytest.mark.parametrize("p", [0.0, 0.4], ids=["whole", "dropout"])
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["f32", "f64"])


def new_model(cell="lstm", embedding=0, p=0.0, *, layers=2, dtype=np.float64, seed=0, **sizes):
    sizes = {"vocab_size": V, "hidden_size": H} | sizes
    return LanguageModel(
        **sizes,
        cell=cell,
        num_layers=layers,
        embedding_size=embedding,
        dropout=p,
        dtype=dtype,
        seed=seed,
    )


def new_data(rng, model, steps=T, batch=B):
    """Tokens, targets and a state that is not zero."""
    tokens, targets = rng.integers(model.vocab_size, size=(2, steps, batch))
    shape = (model.num_layers, batch, model.hidden_size)
    parts = [
        frozen(rng.standard_normal(shape).astype(model.dtype))
        for _ in as_parts(model.initial_state(batch))
    ]
    return frozen(tokens), frozen(targets), as_state(parts)


def reference_mask(shape, p, seed):
    """What dropout with this seed multiplies an array of this shape by."""
    mask = np.ones(shape)
    if p:
        dropout(np.ones(shape), p, seed, mask)
    return mask


def reference_loss_and_grads(model, tokens, targets, state=None, seed=0):
    """The mean loss, the gradients and the final state, of reference functions in float64."""
    params = {key: value.astype(np.float64) for key, value in model.params.items()}
    reference = CELLS[model.cell]
    head = {key: params[f"head.{key}"] for key in ("weight", "bias")}
    state = as_parts(model.initial_state(tokens.shape[1]) if state is None else state)
    shape = (*tokens.shape, model.hidden_size)
    x = tokens
    if model.embedding_size:
        table = {"weight": params["embedding.weight"]}
        x, looked_up = embedding_forward(table, tokens)
    finals, kept, masks = [], [], []
    for layer in range(model.num_layers):
        initial = tuple(s[layer].astype(np.float64) for s in state)
        x, final, saved = reference.forward(layer_params(params, layer), x, initial)
        last = layer == model.num_layers - 1
        masks.append(reference_mask(shape, model.dropout, seed + (255 if last else layer + 1)))
        x = x * masks[layer]
        finals.append(final)
        kept.append(saved)
    logits, fed = linear_forward(head, x)
    losses, d_logits = softmax_cross_entropy(
        logits.reshape(-1, model.vocab_size), targets.reshape(-1)
    )
    d_y, found = linear_backward(head, fed, d_logits.reshape(logits.shape) / targets.size)
    grads = {f"head.{key}": value for key, value in found.items()}
    nothing = tuple(np.zeros(s.shape[1:]) for s in state)
    for layer in reversed(range(model.num_layers)):
        d_y, _, found = reference.backward(
            layer_params(params, layer), kept[layer], d_y * masks[layer], nothing
        )
        grads |= {f"rnn.{key}_l{layer}": value for key, value in found.items()}
    if model.embedding_size:
        grads["embedding.weight"] = embedding_backward(table, looked_up, d_y)["weight"]
    return losses.mean(), grads, tuple(np.stack(parts) for parts in zip(*finals, strict=True))


def layer_params(params, layer):
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return {name: params[f"rnn.{name}_l{layer}"] for name in names}


# Gradients


@each_cell
@each_embedding
@each_dropout
def test_gradients_are_central_differences(cell, embedding, p, rng):
    model = new_model(cell, embedding, p)
    tokens, targets, state = new_data(rng, model)
    _, grads, _ = model.loss_and_grads(tokens, targets, state, seed=7)
    assert grads.keys() == model.params.keys()
    step = 1e-5
    for key, value in model.params.items():
        slope = np.empty(value.shape)
        for index in np.ndindex(value.shape):
            middle = value[index]
            losses = []
            for moved in (middle + step, middle - step):
                value[index] = moved
                losses.append(model.loss_and_grads(tokens, targets, state, seed=7)[0])
            value[index] = middle
            slope[index] = (losses[0] - losses[1]) / (2 * step)
        assert np.linalg.norm(slope) > 1e-3, f"{key} does not matter: this tests nothing"
        np.testing.assert_allclose(grads[key], slope, rtol=1e-6, atol=1e-9, err_msg=key)


@each_cell
@each_embedding
@each_dropout
@each_dtype
def test_loss_gradients_and_state_are_those_of_the_reference(cell, embedding, p, dtype, rng):
    model = new_model(cell, embedding, p, dtype=dtype, hidden_size=9, vocab_size=11, layers=3)
    tokens, targets, state = new_data(rng, model, 6, 5)
    loss, grads, final = model.loss_and_grads(tokens, targets, state, seed=1 << 50)
    wanted = reference_loss_and_grads(model, tokens, targets, state, seed=1 << 50)
    terms = 6 * 5 * 9 * 3
    assert loss == pytest.approx(wanted[0], rel=1e-12 if dtype == np.float64 else 1e-6)
    for key, value in wanted[1].items():
        agree(grads[key], value, dtype, terms, key)
    assert len(grads) == len(wanted[1])
    for got, want in zip(as_parts(final), wanted[2], strict=True):
        agree(got, want, dtype, terms, "state")


@each_cell
@each_embedding
def test_torch_agrees(cell, embedding, rng):
    torch = pytest.importorskip("torch")
    model = new_model(cell, embedding)
    tokens, targets, state = new_data(rng, model)
    loss, grads, final = model.loss_and_grads(tokens, targets, state)
    width = embedding or V
    table = torch.nn.Embedding(V, width, dtype=torch.float64)
    net = getattr(torch.nn, cell.upper())(width, H, 2, dtype=torch.float64)
    head = torch.nn.Linear(H, V, dtype=torch.float64)
    parts = {"rnn": net, "head": head}
    if embedding:
        parts["embedding"] = table
    else:
        table.weight = torch.nn.Parameter(torch.eye(V, dtype=torch.float64), requires_grad=False)
    for name, part in parts.items():
        found = {k: v for k, v in model.params.items() if k.startswith(f"{name}.")}
        part.load_state_dict(
            {k.removeprefix(f"{name}."): torch.tensor(v) for k, v in found.items()}
        )
    start = as_state([torch.tensor(np.array(part)) for part in as_parts(state)])
    y, end = net(table(torch.tensor(np.array(tokens))), start)
    answer = torch.nn.functional.cross_entropy(
        head(y).reshape(-1, V), torch.tensor(np.array(targets)).reshape(-1)
    )
    answer.backward()
    assert loss == pytest.approx(answer.item(), rel=1e-12)
    for got, want in zip(as_parts(final), as_parts(end), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-10, atol=1e-12)
    for name, part in parts.items():
        for key, value in part.named_parameters():
            np.testing.assert_allclose(
                grads[f"{name}.{key}"], value.grad.numpy(), rtol=1e-9, atol=1e-12, err_msg=key
            )


def test_gradients_are_added_to_those_given(rng):
    model = new_model(embedding=E)
    tokens, targets, state = new_data(rng, model)
    _, fresh, _ = model.loss_and_grads(tokens, targets, state)
    given = {key: rng.standard_normal(value.shape) for key, value in model.params.items()}
    before = {key: value.copy() for key, value in given.items()}
    _, grads, _ = model.loss_and_grads(tokens, targets, state, grads=given)
    for key, value in given.items():
        assert grads[key] is value
        np.testing.assert_allclose(value, before[key] + fresh[key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(count, rng):
    model = new_model("gru", 8, 0.3, dtype=np.float32, hidden_size=20, vocab_size=40, layers=2)
    tokens, targets, state = new_data(rng, model, 9, 7)
    results = []
    for n in (1, count):
        with threads(n):
            loss, grads, final = model.loss_and_grads(tokens, targets, state, seed=3)
            logits, _ = model(tokens, state)
            losses, _ = model.token_losses(tokens, targets, state)
        results.append(
            grads | {"loss": np.array(loss), "h": final, "logits": logits, "losses": losses}
        )
    same_results(*results)


# The state


@each_cell
def test_a_state_that_is_carried_gives_the_bits_of_the_whole(cell, rng):
    model = new_model(cell, dtype=np.float32, hidden_size=9)
    tokens, targets, state = new_data(rng, model, 8)
    whole, end = model.token_losses(tokens, targets, state)
    first, middle = model.token_losses(tokens[:3], targets[:3], state)
    second, last = model.token_losses(tokens[3:], targets[3:], middle)
    same(np.concatenate([first, second]), whole)
    loss, _, between = model.loss_and_grads(tokens[:3], targets[:3], state)
    for got, want in zip(as_parts(between), as_parts(middle), strict=True):
        same(got, want)
    for got, want in zip(as_parts(last), as_parts(end), strict=True):
        same(got, want)
    assert loss == pytest.approx(first.mean(), rel=1e-6)


@each_cell
def test_no_state_is_a_state_of_zeros(cell, rng):
    model = new_model(cell)
    tokens, targets, state = new_data(rng, model)
    zeros = model.initial_state(B)
    assert [part.shape for part in as_parts(zeros)] == [(2, B, H)] * (2 if cell == "lstm" else 1)
    assert all(part.dtype == model.dtype and not part.any() for part in as_parts(zeros))
    loss, grads, _ = model.loss_and_grads(tokens, targets)
    with_zeros, wanted, _ = model.loss_and_grads(tokens, targets, zeros)
    assert loss == with_zeros
    same_results(grads, wanted)
    assert loss != model.loss_and_grads(tokens, targets, state)[0]


def test_a_sequence_has_the_same_bits_in_any_batch(rng):
    model = new_model("lstm", E, dtype=np.float32, hidden_size=9)
    tokens, targets, _ = new_data(rng, model, 8, 5)
    whole, _ = model.token_losses(tokens, targets)
    alone, _ = model.token_losses(tokens[:, 3:4], targets[:, 3:4])
    same(alone, np.ascontiguousarray(whole[:, 3:4]))


# Losses


@each_cell
@each_embedding
@each_dtype
def test_the_mean_of_token_losses_is_the_loss(cell, embedding, dtype, rng):
    model = new_model(cell, embedding, dtype=dtype)
    tokens, targets, state = new_data(rng, model)
    losses, _ = model.token_losses(tokens, targets, state)
    assert losses.shape == tokens.shape
    assert losses.dtype == np.float64
    loss, _, _ = model.loss_and_grads(tokens, targets, state)
    assert loss == pytest.approx(losses.mean(), rel=1e-12)


def test_dropout_is_for_training_only(rng):
    plain, dropping = new_model(), new_model(p=0.5)
    same_results(plain.params, dropping.params)
    tokens, targets, _ = new_data(rng, plain)
    same(dropping(tokens)[0], plain(tokens)[0])
    same(dropping.token_losses(tokens, targets)[0], plain.token_losses(tokens, targets)[0])
    losses = [dropping.loss_and_grads(tokens, targets, seed=seed)[0] for seed in (1, 2, 1)]
    assert losses[0] == losses[2]
    assert len({*losses, plain.loss_and_grads(tokens, targets)[0]}) == 3


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_token_losses_by_pieces_have_the_bits_of_the_whole(steps, rng, monkeypatch):
    model = new_model("gru", dtype=np.float32)
    tokens, targets, state = new_data(rng, model, 7)
    calls = []
    forward = LanguageModel.__call__
    monkeypatch.setattr(
        LanguageModel, "__call__", lambda self, x, s: calls.append(len(x)) or forward(self, x, s)
    )
    whole, end = model.token_losses(tokens, targets, state)
    assert calls == [7]
    monkeypatch.setattr(models, "_LOGITS", steps * V * B)
    pieces, last = model.token_losses(tokens, targets, state)
    assert calls[1:] == [steps] * (7 // steps) + [7 % steps] * (7 % steps > 0)
    same(pieces, whole)
    same(last, end)
    # A step that is too large by itself is still worked on.
    monkeypatch.setattr(models, "_LOGITS", 1)
    same(model.token_losses(tokens, targets, state)[0], whole)


def test_logits_are_the_log_probabilities_but_for_a_constant(rng):
    model = new_model("rnn", E)
    tokens, targets, _ = new_data(rng, model)
    logits, _ = model(tokens)
    assert logits.shape == (T, B, V)
    log_p = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    wanted = -np.take_along_axis(log_p, targets[:, :, None], 2)[:, :, 0]
    np.testing.assert_allclose(model.token_losses(tokens, targets)[0], wanted, rtol=1e-12)


# Parameters


@each_cell
@each_embedding
def test_a_change_of_an_array_in_params_is_seen_by_the_next_call(cell, embedding, rng):
    model = new_model(cell, embedding)
    tokens, targets, state = new_data(rng, model)
    for key, value in model.params.items():
        before, (logits, _) = model.loss_and_grads(tokens, targets, state)[0], model(tokens, state)
        value += rng.standard_normal(value.shape)
        loss, grads, _ = model.loss_and_grads(tokens, targets, state)
        assert loss != before, key
        assert (model(tokens, state)[0] != logits).any(), key
        other = new_model(cell, embedding, seed=1)
        other.load_state_dict(model.state_dict())
        wanted, wanted_grads, _ = other.loss_and_grads(tokens, targets, state)
        assert loss == wanted, key
        same_results(grads, wanted_grads)


def test_params_are_those_of_the_parts():
    model = new_model(embedding=E)
    assert model.params["embedding.weight"] is model.embedding.params["weight"]
    assert model.params["rnn.weight_hh_l1"] is model.rnn.params["weight_hh_l1"]
    assert model.params["head.bias"] is model.head.params["bias"]
    assert len(model.params) == 1 + 8 + 2


def test_a_seed_draws_the_same_weights_and_another_one_others():
    same_results(new_model(seed=3).params, new_model(seed=3).params)
    for key, value in new_model(seed=4).params.items():
        assert (value != new_model(seed=3).params[key]).any(), key


@each_cell
@each_dropout
@each_dtype
def test_an_embedding_may_be_read_by_token_or_by_step(cell, p, dtype, rng, monkeypatch):
    model = new_model(cell, E, p, dtype=dtype)
    tokens, targets, *_ = new_data(rng, model)
    found = []
    for few in (0, model.vocab_size):
        monkeypatch.setattr(models, "_FEW", few)
        found.append(model.loss_and_grads(tokens, targets, seed=7))
    (want, grads_want, state_want), (got, grads, state) = found
    assert got == want
    for part, value in zip(as_parts(state), as_parts(state_want), strict=True):
        np.testing.assert_array_equal(part, value)
    bound = 1e-12 if dtype is np.float64 else 1e-4
    for key, value in grads_want.items():
        error = np.linalg.norm(grads[key] - value) / np.linalg.norm(value)
        assert error <= bound, key
        assert key in ("embedding.weight", "rnn.weight_ih_l0") or not error


@each_cell
def test_logits_are_the_same_however_the_embedding_is_read(cell, rng):
    model = new_model(cell, E, dtype=np.float32)
    tokens, *_ = new_data(rng, model, steps=3 * model.vocab_size, batch=1)
    whole, _ = model(tokens)
    state, rows = None, []
    for step in range(len(tokens)):
        logits, state = model(tokens[step : step + 1], state)
        rows.append(logits)
    np.testing.assert_array_equal(np.concatenate(rows), whole)


# Descriptions


@each_cell
@each_embedding
@each_dtype
def test_a_config_makes_the_model_again(cell, embedding, dtype, rng):
    model = new_model(cell, embedding, 0.25, dtype=dtype)
    config = json.loads(json.dumps(model.config()))
    again = model_from_config(config, model.state_dict())
    assert again.config() == model.config() == config
    same_results(again.params, model.params)
    tokens, targets, state = new_data(rng, model)
    loss, grads, _ = model.loss_and_grads(tokens, targets, state, seed=5)
    loss_again, grads_again, _ = again.loss_and_grads(tokens, targets, state, seed=5)
    assert loss == loss_again
    same_results(grads, grads_again)
    assert repr(model) == repr(again)
    assert f"cell={cell!r}" in repr(model)


HOSTILE = {
    "vocab_size": [0, -1, 6, 10**6, 10**18, 10**30, 5.0, True, "5", None, [5]],
    "hidden_size": [0, -1, 4, 10**5, 10**18, 10**30, 3.0, True, "3", None],
    "cell": ["", "gru", "LSTM", "__class__", None, 1, ["lstm"]],
    "num_layers": [0, -1, 1, 3, 256, 10**9, 10**30, 2.0, None],
    "embedding_size": [-1, 0, 3, 10**7, 10**18, 10**30, None, "2"],
    "dropout": [-0.1, 1.0, float("nan"), float("inf"), 0, "0", None, []],
    "dtype": ["float16", "float64", ">f4", "O", "f4,(2", "M8[", "\ud800", "", None, 4],
}


def refuse(config, weights):
    """A ValueError, and no memory for what the config claims."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            model_from_config(config, weights)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, values in HOSTILE.items() for value in values],
    ids=lambda value: ascii(value)[:20],
)
def test_a_hostile_config_is_refused_and_allocates_nothing(key, value):
    model = new_model(embedding=E, dtype=np.float32)
    config = model.config() | {key: value}
    refuse(config, model.params)


@pytest.mark.parametrize("config", [None, [], "model", {}, {"vocab_size": 5}, 5])
def test_a_config_that_is_no_description_is_refused(config):
    with pytest.raises(ValueError, match=r"^model: expected the keys"):
        model_from_config(config, new_model().params)


def test_a_config_with_a_key_too_many_is_refused():
    model = new_model()
    with pytest.raises(ValueError, match=r"^model: expected the keys"):
        model_from_config(model.config() | {"seed": 1}, model.params)


@pytest.mark.parametrize("key", sorted(new_model(embedding=E).params))
def test_weights_must_bear_out_the_config(key):
    model = new_model(embedding=E)
    value = model.params[key]
    wrong = [
        None,
        value[None],
        np.zeros((value.shape[0] + 1, *value.shape[1:])),
        np.zeros((0, *value.shape[1:])),
        np.zeros(value.size + 1),
        value.astype(np.float32),
        value.astype(np.int64),
    ]
    for array in wrong:
        weights = {k: v for k, v in model.params.items() if k != key}
        if array is not None:
            weights[key] = array
        with pytest.raises(ValueError, match=r"^model: expected"):
            model_from_config(model.config(), weights)


def test_an_unknown_weight_is_refused():
    model = new_model()
    for name in ("rnn.weight_ih_l2", "embedding.weight", "x" * 10**6):
        with pytest.raises(ValueError, match=r"^model: expected") as caught:
            model_from_config(model.config(), model.params | {name: np.zeros((5, 3))})
        assert len(str(caught.value)) < 300


def test_sizes_that_only_empty_arrays_bear_out_are_not_allocated():
    model = new_model(embedding=E, layers=1, dtype=np.float32)
    width = 10**7
    weights = model.params | {"rnn.weight_ih_l0": np.zeros((0, width), np.float32)}
    refuse(model.config() | {"embedding_size": width}, weights)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size: expected at least 1, got 0"),
        ({"vocab_size": 2.5}, TypeError, "vocab_size: expected an integer, got 2.5"),
        ({"hidden_size": 0}, ValueError, "hidden_size: expected at least 1, got 0"),
        ({"num_layers": 0}, ValueError, "num_layers: expected at least 1, got 0"),
        ({"num_layers": 256}, ValueError, "num_layers: expected at most 254, got 256"),
        ({"embedding_size": -1}, ValueError, "embedding_size: expected at least 0, got -1"),
        ({"cell": "LSTM"}, ValueError, "cell: expected one of lstm, gru, rnn, got 'LSTM'"),
        ({"dropout": 1}, ValueError, "dropout: expected a number in [0, 1), got 1"),
        ({"dropout": float("nan")}, ValueError, "dropout: expected a number in [0, 1), got nan"),
        ({"dtype": np.float16}, ValueError, "dtype: expected float32 or float64"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(arguments, error, message):
    with pytest.raises(error) as caught:
        LanguageModel(**({"vocab_size": 5, "hidden_size": 3} | arguments))
    assert str(caught.value).startswith(message)


def test_bad_tokens_targets_and_states_are_named(rng):
    model = new_model()
    tokens, targets, state = new_data(rng, model)
    for method in (model.loss_and_grads, model.token_losses):
        with pytest.raises(ValueError, match=r"^tokens: expected tokens in \[0, 5\), got 5"):
            method(np.full((T, B), V), targets)
        with pytest.raises(ValueError, match=r"^targets: expected tokens in \[0, 5\), got -1"):
            method(tokens, np.full((T, B), -1))
        with pytest.raises(TypeError, match=r"^tokens: expected integer tokens, got float64"):
            method(tokens / 2, targets)
        with pytest.raises(ValueError, match=r"^tokens: expected shape \(T, B\)"):
            method(tokens[0], targets[0])
        with pytest.raises(ValueError, match=r"^tokens: expected shape.*no axis may be empty"):
            method(tokens[:0], targets[:0])
        with pytest.raises(ValueError, match=r"^targets: expected shape \(T, B\) = \(4, 2\)"):
            method(tokens, targets[1:])
        with pytest.raises(ValueError, match=r"^state h: expected shape"):
            method(tokens, targets, tuple(part[1:] for part in state))
        with pytest.raises(TypeError, match=r"^state: expected a pair"):
            method(tokens, targets, state[0])
    grads = {key: np.zeros_like(value) for key, value in model.params.items()}
    grads["head.weight"] = np.zeros((1, 1))
    with pytest.raises(ValueError, match=r"^grads\['head.weight'\]: expected"):
        model.loss_and_grads(tokens, targets, grads=grads)
    with pytest.raises(ValueError, match=r"^batch: expected at least 1"):
        model.initial_state(0)


def test_an_array_that_kernels_cannot_read_is_named_when_it_is_used(rng):
    model = new_model(embedding=E)
    tokens, targets, _ = new_data(rng, model)
    model.head.params["weight"] = np.zeros((V, H), np.float32)
    with pytest.raises(ValueError, match=r"^params\['weight'\]: expected"):
        model.loss_and_grads(tokens, targets)


def test_integers_of_any_kind_and_order_are_tokens(rng):
    model = new_model()
    tokens, targets, _ = new_data(rng, model)
    wanted = model.loss_and_grads(tokens, targets)[0]
    for kind in (np.uint8, np.int16, np.int32, np.uint64):
        assert model.loss_and_grads(tokens.astype(kind), targets.astype(kind))[0] == wanted
    fortran = np.asfortranarray(tokens), np.asfortranarray(targets)
    assert model.loss_and_grads(*fortran)[0] == wanted
    assert model.loss_and_grads(tokens.tolist(), targets.tolist())[0] == wanted
