"""PyTorch, as it is.

`torch.compile` leaves recurrent layers alone. If told not to (`torch._dynamo.config.allow_rnn`) it
writes out every step of a training: PyTorch 2.13 had not finished with 64 steps of an LSTM after
two minutes. In inference an LSTM of float32 stays one operation, whose weights can be packed
beforehand (`freezing`): 0.9 to 1.1 of the time.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from typing import Any

import torch
from torch import nn

from bench.cases import Case
from bench.language import NORM, RATE, STEPS, Lesson, seen, text
from bench.problem import Answer, Problem, problem

# Steps that tell which of two ways is faster.
_TRIED = 9
_KINDS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
_CELLS = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}


def _load(module: nn.Module, params: dict, dtype: str) -> Any:
    module.to(getattr(torch, dtype))
    module.load_state_dict({key: torch.from_numpy(value) for key, value in params.items()})
    return module


def _layer(case: Case, cell: str, dtype: str, threads: int) -> tuple[Any, Problem]:
    torch.set_num_threads(threads)
    given = problem(case, cell, dtype)
    return _load(_KINDS[cell](case.I, case.H), given.params, dtype), given


def _both_ways(layer: Any, given: Problem, output: Any) -> Any:
    x, d_y = torch.from_numpy(given.x).requires_grad_(), torch.from_numpy(given.d_y)

    def step() -> Any:
        layer.zero_grad()
        x.grad = None
        y = output(layer(x))
        y.backward(d_y)
        return y

    def read(y: Any) -> Answer:
        grads = {key: p.grad for key, p in layer.named_parameters()}
        return {"y": y.detach(), "d_x": x.grad, **grads}

    return step, read


def training(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """forward and autograd's backward."""
    return _both_ways(*_layer(case, cell, dtype, threads), lambda found: found[0])


def projection(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """The same of `nn.Linear`."""
    torch.set_num_threads(threads)
    given = problem(case, cell, dtype, "projection")
    layer = _load(nn.Linear(case.I, case.H), given.params, dtype)
    return _both_ways(layer, given, lambda y: y)


def inference(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """forward under inference_mode, or compiled with its weights if that is faster."""
    layer, given = _layer(case, cell, dtype, threads)
    x = torch.from_numpy(given.x)

    @torch.inference_mode()
    def step() -> Any:
        return layer(x)[0]

    steps = [step]
    if (cell, dtype) == ("lstm", "float32"):
        # Without a C++ compiler there is no such thing.
        with contextlib.suppress(Exception):
            steps.append(_compiled(layer, x))
    return min(steps, key=_lasts), lambda y: {"y": y}


def _compiled(layer: Any, x: Any) -> Any:
    """A step of a layer that is compiled with its weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch._dynamo import config as dynamo
        from torch._inductor import config as inductor

        dynamo.allow_rnn = inductor.freezing = True
        compiled = torch.compile(layer.eval())

        @torch.no_grad()
        def step() -> Any:
            return compiled(x)[0]

        step()
    return step


def _lasts(step: Any) -> float:
    """Seconds, by the median of some."""
    times = []
    for _ in range(_TRIED):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def stepping(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """`nn.LSTMCell` and its like under inference_mode: quicker than a layer with T = 1."""
    torch.set_num_threads(threads)
    given = problem(case, cell, dtype)
    params = {key.removesuffix("_l0"): value for key, value in given.params.items()}
    layer = _load(_CELLS[cell](case.I, case.H), params, dtype)
    x = torch.from_numpy(given.x).unbind()

    @torch.inference_mode()
    def step() -> list:
        state = None
        ys = []
        for x_t in x:
            state = layer(x_t, state)
            ys.append(state[0] if cell == "lstm" else state)
        return ys

    return step, lambda ys: {"y": torch.stack(ys)}


class _Model(nn.Module):
    def __init__(self, case: Case, cell: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(case.I, case.H)
        self.rnn = _KINDS[cell](
            case.H, case.H, case.layers, dropout=dropout if case.layers > 1 else 0.0
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(case.H, case.I)

    def forward(self, tokens: Any, state: Any = None) -> Any:
        y, state = self.rnn(self.embedding(tokens), state)
        return self.head(self.dropout(y)), state


class Learner:
    """Embedding, layers, linear, cross_entropy, clip_grad_norm_, Adam; keeps the state."""

    def __init__(self, lesson: Lesson) -> None:
        case, cell, params, self.norm, threads, dropout, seed = lesson
        torch.set_num_threads(threads)
        dtype = str(params["head.bias"].dtype)
        self.model = _load(_Model(case, cell, dropout), params, dtype)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=RATE)
        self.state = None
        torch.manual_seed(seed)

    def set_rate(self, rate: float) -> None:
        """Of Adam, from now on."""
        self.adam.param_groups[0]["lr"] = rate

    def _loss(self, tokens: Any, targets: Any) -> Any:
        logits, state = self.model(torch.from_numpy(tokens).long(), self.state)
        lstm = isinstance(state, tuple)
        self.state = tuple(one.detach() for one in state) if lstm else state.detach()
        aims = torch.from_numpy(targets).long().reshape(-1)
        return nn.functional.cross_entropy(logits.reshape(len(aims), -1), aims)

    def learn(self, tokens: Any, targets: Any) -> tuple[float, float]:
        """One step: loss, norm of the gradients."""
        self.adam.zero_grad()
        loss = self._loss(tokens, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.norm)
        self.adam.step()
        return loss.item(), norm.item()

    @torch.inference_mode()
    def loss(self, tokens: Any, targets: Any) -> float:
        """Of other tokens."""
        kept, self.state = self.state, None
        self.model.eval()
        found = self._loss(tokens, targets).item()
        self.model.train()
        self.state = kept
        return found


def language(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """`Learner`, from a state of zeros."""
    params, tokens, targets = text(case, cell, dtype)
    learner = Learner(Lesson(case, cell, params, NORM, threads))

    def step() -> tuple[float, float]:
        learner.state = None
        return learner.learn(tokens, targets)

    return step, lambda first: {"steps": [first, *(step() for _ in range(STEPS - 1))]}


def sampling(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """A loop of single steps of cells, softmax and multinomial; what is compared is greedy."""
    torch.set_num_threads(threads)
    given = text(case, cell, dtype)
    model = _load(_Model(case, cell), given.params, dtype)
    cells = []
    for layer in range(case.layers):
        end = f"_l{layer}"
        of_layer = {key: p for key, p in given.params.items() if key.endswith(end)}
        names = {key.removeprefix("rnn.").removesuffix(end): p for key, p in of_layer.items()}
        cells.append(_load(_CELLS[cell](case.H, case.H), names, dtype))
    prompt = torch.from_numpy(given.tokens[0]).long()

    @torch.inference_mode()
    def write(greedy: bool) -> Any:
        tokens, states, written = prompt, [None] * case.layers, []
        for _ in range(case.T):
            x = model.embedding(tokens)
            for layer, one in enumerate(cells):
                states[layer] = one(x, states[layer])
                x = states[layer][0] if cell == "lstm" else states[layer]
            logits = model.head(x)
            if greedy:
                tokens = logits.argmax(dim=1)
            else:
                tokens = torch.multinomial(torch.softmax(logits, dim=1), 1)[:, 0]
            written.append(tokens)
        return torch.stack(written)

    def read(drawn: Any) -> Answer:
        return {"tokens": write(True), "drawn": seen(drawn.numpy(), case)}

    return lambda: write(False), read
