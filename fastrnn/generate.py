"""Sampling from a language model, the whole loop compiled: no Python for a token."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from fastrnn.checks import as_array, as_number, as_size, as_token, as_tokens
from fastrnn.counter import random_bits
from fastrnn.crew import divided
from fastrnn.gemm import multiply
from fastrnn.jit import helper, kernel
from fastrnn.meeting import NOBODY, arrive, gather, together, wait
from fastrnn.memory import empty
from fastrnn.models import LanguageModel
from fastrnn.noise import expected
from fastrnn.pack import pack_transposed
from fastrnn.parallel import parts_for, run
from fastrnn.simd import at, flush_denormals, padded, restore_denormals, width_of
from fastrnn.stepper import advance, bind
from fastrnn.units import parts_of_units, units_of


@helper
def _argmax(logits, at, size):
    """Where the largest is, or the first NaN."""
    best = 0
    for j in range(size):
        if math.isnan(logits[at + j]):
            return j
        if logits[at + j] > logits[at + best]:
            best = j
    return best


@helper
def _draw(logits, at, size, temperature, top_k, top_p, u, weights):
    """A token drawn with u in [0, 1), or -1 if the logits are not finite."""
    best = _argmax(logits, at, size)
    highest = np.float64(logits[at + best])
    total = 0.0
    for j in range(size):
        weights[j] = math.exp((np.float64(logits[at + j]) - highest) / temperature)
        total += weights[j]
    if not math.isfinite(total):
        return -1
    if top_k >= size and top_p >= 1:
        reached = 0.0
        for j in range(size):
            reached += weights[j]
            if u * total < reached:
                return j
        return best
    order = np.argsort(-weights[:size], kind="mergesort")
    kept = min(top_k, size)
    total = 0.0
    for j in range(kept):
        total += weights[order[j]]
    # The fewest of the likeliest tokens that together reach top_p.
    enough, reached = 0, 0.0
    while enough < kept and (enough == 0 or reached < top_p * total):
        reached += weights[order[enough]]
        enough += 1
    goal = u * reached
    reached = 0.0
    for j in range(enough):
        reached += weights[order[j]]
        if goal < reached:
            return order[j]
    return order[0]


@kernel
def _generate(
    part, parts, meeting, cell, size, fresh, columns, embedding, values, places, w_head, b_head,
    h, carry, tokens, x, s, logits, chances, greedy, temperature, top_k, top_p, seed, eos,
    out, counts, left,
):  # fmt: skip
    """Continue the sequences of one slice of the batch, or all on one slice of the units.

    size                H
    embedding           (V, E) if the first layer does not take tokens, else (1, 0)
    fresh, values, places   of all layers, see `fastrnn.stepper`
    h                   (2, layers, B, H), in turn before and after a step; with a projection P
    carry (layers, B, carries*Hp), tokens (B,): where they are; updated
    x, s, logits        (parts or 1, B, E), (B, columns), (B, V), scratch; chances (parts, V), too
    out                 (steps, B), what is drawn
    counts              (B,), how many tokens until `eos`; -1 after logits that are not finite
    left                (parts,), how many sequences of a slice go on
    """
    if divided(part, parts):
        return
    if meeting.size > 0:
        parts = gather(meeting, part, parts)
        if parts == 0:
            return
    mode = flush_denormals()
    batch, breadth = h.shape[2:]
    w = width_of(h)
    steps = out.shape[0]
    vocabulary = b_head.size
    width = embedding.shape[1]
    together = meeting.size > 0 and parts > 1
    low, high, first, rows, slot = 0, (size + w - 1) // w * w, 0, batch, 0
    if meeting.size > 0:
        low, high = units_of(part, parts, size, w)
    else:
        first, slot = batch * part // parts, part
        rows = batch * (part + 1) // parts - first
    # Parts that share the units leave the drawing to the first.
    draws = not together or part == 0
    if draws:
        left[slot] = rows
    done = 0
    for step in range(steps):
        if together:
            done += 1
            arrive(meeting, part, done)
            wait(meeting, parts, done)
        if left[slot] == 0:
            break
        mine = part if together else 0
        for r in range(rows):
            for j in range(width):
                x[mine, first + r, j] = embedding[tokens[first + r], j]
        inputs = at(x, (mine * batch + first) * width)
        before, after = h[step % 2], h[(step + 1) % 2]
        done = advance(
            cell, size, fresh, values, places, inputs, tokens, before, after, carry,
            at(s, first * columns), columns, first, rows, low, high, meeting, part, parts, done,
        )  # fmt: skip
        if not draws:
            continue
        top = ((after.shape[0] - 1) * batch + first) * breadth
        multiply(
            1, rows, vocabulary, breadth, at(after, top), breadth, 0, at(w_head, 0), at(b_head, 0),
            0, at(logits, first * vocabulary), vocabulary, 0,
        )  # fmt: skip
        for b in range(first, first + rows):
            row = b * vocabulary
            if greedy:
                token = _argmax(logits, row, vocabulary)
                if not math.isfinite(logits[row + token]):
                    token = -1
            else:
                bits = random_bits(seed, b, step) >> np.uint64(11)
                u01 = np.float64(bits) * 2.0**-53
                mine_of = chances[slot]
                token = _draw(logits, row, vocabulary, temperature, top_k, top_p, u01, mine_of)
            if counts[b] == step:
                if token < 0:
                    counts[b] = -1
                    left[slot] -= 1
                elif token == eos:
                    left[slot] -= 1
                else:
                    counts[b] += 1
            tokens[b] = max(token, 0)
            out[step, b] = tokens[b]
    restore_denormals(mode)


def generate(
    model: LanguageModel,
    prompt: Any,
    length: int = 100,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    seed: int | None = None,
    eos: int | None = None,
    num_sequences: int = 1,
) -> list[np.ndarray]:
    """Tokens that the model writes after a prompt.

    prompt       tokens (T,), T from 1, continued `num_sequences` times; or (T, B), each once
    length       how many tokens at most
    temperature  above 0; below 1 likelier tokens become likelier still
    top_k        draw from the k likeliest tokens only
    top_p        draw from the fewest likeliest tokens whose probabilities reach p, after top_k
    greedy       always the likeliest token
    seed         the same seed gives the same text; sequence i uses random numbers of its own
    eos          stop a sequence at this token, which is not returned
    Returns for each sequence an int32 array of at most `length` tokens.
    """
    length = as_size("length", length)
    temperature = as_number("temperature", temperature, 0, math.inf, open_low=True)
    vocabulary = model.vocab_size
    k = vocabulary if top_k is None else min(vocabulary, as_size("top_k", top_k))
    p = 1.0 if top_p is None else as_number("top_p", top_p, 0, math.inf, open_low=True)
    if p > 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    end = -1 if eos is None else as_token("eos", eos, vocabulary)
    # Kernels read a denormal number as zero.
    temperature = max(temperature, sys.float_info.min)
    for part in (model.embedding, model.rnn, model.head):
        if part is not None:
            part.check_params()
    array = as_array("prompt", prompt)
    if array.ndim == 1:
        array = np.repeat(array[:, None], as_size("num_sequences", num_sequences), axis=1)
    elif num_sequences != 1:
        raise ValueError(f"num_sequences: expected 1 with a prompt (T, B), got {num_sequences}")
    ids = as_tokens("prompt", array, vocabulary, (None, None), "(T, B)")
    batch = ids.shape[1]
    state = model.initial_state(batch)
    if len(ids) > 1:
        x = ids[:-1] if model.embedding is None else model.embedding(ids[:-1])
        _, state = model.rnn(x, state)
    rnn: Any = model.rnn
    dtype = model.dtype
    cell = rnn.cell
    layers = [rnn._weights(i, rnn.params)[0][:6] for i in range(model.num_layers)]
    hidden = model.hidden_size
    parts = parts_of_units(cell, length, batch, hidden, dtype)
    apart = parts > 1
    vectors = None
    # Either way gives the same bits.
    if model.embedding is not None and vocabulary <= length * batch:
        vectors = model.embedding.params["weight"]
    tokens = model.embedding is None or vectors is not None
    bound = bind(cell, layers, tokens, table=vectors, apart=apart)
    embedding = np.zeros((1, 0), dtype)
    if not tokens and model.embedding is not None:
        embedding = model.embedding.params["weight"]
    parts_of_state = state if isinstance(state, tuple) else (state,)
    run_length = padded(hidden, dtype)
    carry = np.zeros((model.num_layers, batch, cell.carries * run_length), dtype)
    for i, value in enumerate(parts_of_state[1:]):
        carry[:, :, i * run_length : i * run_length + hidden] = value
    h = np.array([parts_of_state[0]] * 2)
    out = np.zeros((length, batch), np.int32)
    counts = np.zeros(batch, np.int64)
    if seed is None:
        seed = int(np.random.default_rng().integers(2**63))
    seed = as_size("seed", seed, -(2**63))
    if not apart:
        table = rnn.params["weight_ih_l0"].size if tokens else 0
        work = length * batch * (bound.values.size - table + model.head.params["weight"].size)
        parts = parts_for(work, batch)
    columns = cell.tape * run_length
    arguments = (
        cell,
        hidden,
        expected(rnn.zoneout, dtype),
        columns,
        embedding,
        *bound,
        pack_transposed(model.head.params["weight"], (0,)),
        model.head.params["bias"],
        h,
        carry,
        ids[-1].copy(),
        empty((parts if apart else 1, batch, embedding.shape[1]), dtype),
        empty((batch, columns), dtype),
        empty(batch * vocabulary, dtype),
        np.empty((parts, vocabulary)),
        bool(greedy),
        temperature,
        k,
        p,
        np.uint64(seed % 2**64),
        end,
        out,
        counts,
        np.zeros(parts, np.int64),
    )
    if apart:
        together(_generate, parts, *arguments)
    else:
        run(_generate, parts, NOBODY, *arguments)
    if counts.min() < 0:
        raise ValueError("model: expected finite logits, got NaN or infinity; its weights are bad")
    return [out[: counts[b], b].copy() for b in range(batch)]
