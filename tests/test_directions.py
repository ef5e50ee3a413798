"""Both directions: two layers, one of which reads every sequence from its end."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    agree,
    as_parts,
    as_state,
    each_cell,
    each_dtype,
    new_layer,
    same,
    same_results,
    terms,
    threads,
    tolerance,
)

import fastrnn

T, n_in, H = 6, 5, 7
LENGTHS = [(3, 6, 0, 6, 1), (6, 6, 6), (2,), (0,)]
each_lengths = pytest.mark.parametrize("lengths", LENGTHS, ids=str)


def normal(rng, dtype, *shape):
    return rng.standard_normal(shape).astype(dtype)


def results(rnn, x, state, d_output, d_state, lengths, **options):
    """Every array of forward and backward."""
    y, final, saved = rnn.forward(x, as_state(state), lengths, seed=1, **options)
    d_x, d_first, grads = rnn.backward(saved, d_output, as_state(d_state))
    named = {"output": y.copy()} | ({} if d_x is None else {"d x": d_x})
    for kind, parts in (("final", final), ("d initial", d_first)):
        named |= {f"{kind} {i}": part for i, part in enumerate(as_parts(parts))}
    return named | grads


def problem(cell, rng, dtype, lengths, layers, **options):
    rnn = new_layer(cell, n_in, H, layers, bidirectional=True, dtype=dtype, seed=0, **options)
    B = len(lengths)
    states = [
        tuple(normal(rng, dtype, 2 * layers, B, size) for size in rnn.state_sizes) for _ in range(2)
    ]
    x = normal(rng, dtype, T, B, n_in)
    return rnn, x, states[0], normal(rng, dtype, T, B, rnn.output_size), states[1], lengths


def one_way(cell, rnn, layer, reverse, columns):
    """The layer of one direction that has the same weights."""
    end = f"_l{layer}" + ("_reverse" if reverse else "")
    alone = new_layer(cell, columns, H, dtype=rnn.dtype)
    keys = [key.removesuffix("_l0") for key in alone.params]
    alone.load_state_dict({f"{key}_l0": rnn.params[key + end] for key in keys})
    return alone


def turned(array, lengths):
    """Each sequence (T, B, ...) from its end on."""
    array = array.copy()
    for b, length in enumerate(lengths):
        array[:length, b] = array[:length, b][::-1]
    return array


def by_hand(cell, rnn, x, state, d_output, d_state, lengths):
    """The same from layers of one direction."""
    layers, joined, found = [], x, {}
    finals, firsts = [], []
    for layer in range(rnn.num_layers):
        sides = []
        for side in range(2):
            alone = one_way(cell, rnn, layer, side == 1, joined.shape[2])
            at = slice(2 * layer + side, 2 * layer + side + 1)
            x_side = turned(joined, lengths) if side else joined
            y, final, saved = alone.forward(x_side, as_state([s[at] for s in state]), lengths)
            sides.append((alone, saved, turned(y, lengths) if side else y))
            finals.append(as_parts(final))
        layers.append(sides)
        ys = [y for *_, y in sides]
        joined = {
            "concat": lambda ys=ys: np.concatenate(ys, axis=2),
            "sum": lambda ys=ys: ys[0] + ys[1],
            "mean": lambda ys=ys: (ys[0] + ys[1]) * x.dtype.type(0.5),
        }[rnn.merge]()
    found["output"] = joined
    d_y = d_output
    for layer in reversed(range(rnn.num_layers)):
        d_x = 0
        for side in (1, 0):
            alone, saved, _ = layers[layer][side]
            d_side = d_y
            if rnn.merge == "concat":
                width = rnn.state_sizes[0]
                d_side = np.ascontiguousarray(d_y[:, :, side * width : (side + 1) * width])
            elif rnn.merge == "mean":
                d_side = d_y * x.dtype.type(0.5)
            at = slice(2 * layer + side, 2 * layer + side + 1)
            d_side = turned(d_side, lengths) if side else d_side
            d_in, d_first, grads = alone.backward(saved, d_side, as_state([d[at] for d in d_state]))
            firsts.insert(0, as_parts(d_first))
            end = f"_l{layer}" + ("_reverse" if side else "")
            found |= {key.removesuffix("_l0") + end: value for key, value in grads.items()}
            d_x = d_x + (turned(d_in, lengths) if side else d_in)
        d_y = d_x
    found["d x"] = d_y
    for kind, parts in (("final", finals), ("d initial", firsts)):
        for i in range(len(parts[0])):
            found[f"{kind} {i}"] = np.concatenate([part[i] for part in parts])
    return found


@each_cell
@each_dtype
@each_lengths
@pytest.mark.parametrize("merge", ["concat", "sum", "mean"])
@pytest.mark.parametrize("layers", [1, 2])
def test_two_layers_of_one_direction(cell, dtype, lengths, merge, layers, rng):
    given = problem(cell, rng, dtype, lengths, layers, merge=merge)
    got, want = results(*given), by_hand(cell, *given)
    assert got.keys() == want.keys()
    for key in want:
        # Gradients are added up in the caller's time, which turned sequences do not share.
        shared = "_reverse" not in key or len(set(lengths)) == 1
        if (layers == 1 and shared) or key in ("output", "final 0"):
            same(got[key], np.ascontiguousarray(want[key]), key)
        else:
            scale = max(1, np.abs(want[key]).max())
            assert np.abs(got[key] - want[key]).max() <= tolerance(dtype, 200) * scale, key
    with threads(3):
        same_results(results(*given), got)
    without, final = given[0](given[1], as_state(given[2]), lengths)
    same(np.ascontiguousarray(without), got["output"])
    same(as_parts(final)[0], got["final 0"])


@pytest.mark.parametrize(
    ("cell", "dtype", "layers", "bias"),
    [
        ("rnn_tanh", np.float64, 2, True),
        ("rnn_relu", np.float64, 2, True),
        ("gru", np.float64, 3, True),
        ("lstm", np.float64, 2, True),
        ("lstm_projected", np.float64, 2, True),
        ("lstm_projected", np.float64, 2, False),
        ("lstm_projected", np.float32, 2, True),
    ],
    ids=lambda value: np.dtype(value).name if isinstance(value, type) else str(value),
)
@pytest.mark.parametrize("lengths", [(3, 6, 2, 6, 1), None], ids=["packed", "plain"])
def test_against_pytorch(cell, dtype, layers, bias, lengths, rng):
    torch = pytest.importorskip("torch")
    given = problem(cell, rng, dtype, lengths or (T,) * 3, layers, bias=bias)
    rnn, x, state, d_output, d_state, _ = given
    options = {"nonlinearity": rnn.nonlinearity} if "rnn" in cell else {}
    options |= {"proj_size": rnn.proj_size} if rnn.proj_size else {}
    theirs = getattr(torch.nn, type(rnn).__name__)(
        n_in, H, layers, bias=bias, bidirectional=True, dtype=torch.float64, **options
    )
    assert list(theirs.state_dict()) == list(rnn.params)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in rnn.params.items()})

    def leaf(array):
        return torch.tensor(array, dtype=torch.float64, requires_grad=True)

    x_t, first = leaf(x), [leaf(s) for s in state]
    if lengths:
        from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

        sequences = pack_padded_sequence(x_t, torch.tensor(lengths), enforce_sorted=False)
        output, final = theirs(sequences, as_state(first))
        output, _ = pad_packed_sequence(output, total_length=T)
    else:
        output, final = theirs(x_t, as_state(first))
    finals = as_parts(final)
    loss = (output * torch.from_numpy(d_output)).sum()
    for part, d in zip(finals, d_state, strict=True):
        loss = loss + (part * torch.from_numpy(d)).sum()
    loss.backward()
    want = {"output": output, "d x": x_t.grad} | {k: p.grad for k, p in theirs.named_parameters()}
    want |= {f"final {i}": part for i, part in enumerate(finals)}
    want |= {f"d initial {i}": part.grad for i, part in enumerate(first)}
    got = results(*given[:-1], lengths)
    assert got.keys() == want.keys()
    for key, value in want.items():
        agree(got[key], value.detach().numpy(), dtype, terms(rnn, x), key)


@each_cell
def test_tokens_and_vectors(cell, rng):
    rnn = new_layer(cell, 4, H, bidirectional=True, dtype=np.float64, seed=0)
    tokens, vectors = rng.integers(9, size=(T, 3)), normal(rng, "f8", 9, 4)
    y, _, saved = rnn.forward(tokens, vectors=vectors)
    want, _, other = rnn.forward(vectors[tokens])
    same(y, want)
    d_y = normal(rng, "f8", *y.shape)
    d_vectors, _, _ = rnn.backward(saved, d_y)
    d_x, _, _ = rnn.backward(other, d_y)
    sums = np.zeros_like(vectors)
    np.add.at(sums, tokens, d_x)
    np.testing.assert_allclose(d_vectors, sums, rtol=1e-10, atol=1e-12)
    one_hot = new_layer(cell, 9, H, bidirectional=True, dtype=np.float64, seed=0)
    y, _, saved = one_hot.forward(tokens)
    want, _, other = one_hot.forward(np.eye(9)[tokens])
    np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-14)
    d_x, _, grads = one_hot.backward(saved, d_y)
    _, _, wanted = one_hot.backward(other, d_y)
    assert d_x is None
    for key in wanted:
        np.testing.assert_allclose(grads[key], wanted[key], rtol=1e-9, atol=1e-11)


@each_cell
def test_a_reset_parts_both_directions(cell, rng):
    rnn = new_layer(cell, n_in, H, bidirectional=True, dtype=np.float64, seed=0)
    x = normal(rng, "f8", T, 1, n_in)
    resets = np.zeros((T, 1), bool)
    resets[4] = True
    y, final = rnn(x, resets=resets)
    final = as_parts(final)[0]
    early, late = rnn(x[:4]), rnn(x[4:])
    same(np.ascontiguousarray(y), np.concatenate([early[0], late[0]]))
    same(final[0], as_parts(late[1])[0][0])
    same(final[1], as_parts(early[1])[0][1])


def test_arguments():
    with pytest.raises(ValueError, match="merge: expected one of concat, sum, mean, got 'mul'"):
        fastrnn.GRU(n_in, H, bidirectional=True, merge="mul")
    with pytest.raises(ValueError, match="merge: expected bidirectional=True"):
        fastrnn.GRU(n_in, H, merge="sum")
    with pytest.raises(ValueError, match="stepper: expected a layer of one direction"):
        fastrnn.GRU(n_in, H, bidirectional=True).stepper()
    gru = fastrnn.GRU(n_in, H, bidirectional=True)
    with pytest.raises(ValueError, match=r"state: .*\(layers \* directions, B, H\) = \(2, 3, 7\)"):
        gru(np.zeros((T, 3, n_in), np.float32), np.zeros((1, 3, H), np.float32))
