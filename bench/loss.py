"""Time until a language model has learnt a text so far that its loss on the end of it is TARGET.

    python -m bench.loss TEXT

The same model from the same weights, the same optimiser, text and order for fastrnn and PyTorch, in
a process each, which take turns. What counts is the time of training steps, not of the validations
between them.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import CELLS, find
from bench.language import weights
from bench.peers import contestant
from bench.runner import start_worker
from fastrnn.text import Vocabulary, read_corpus

# The share of the text that is kept for validation, in so many streams.
_KEPT, _STREAMS = 0.05, 32
# Nats between the losses of contestants before the first step.
_GATE = 1e-5


def _streams(ids: np.ndarray, count: int) -> np.ndarray:
    """(T, count): the ids cut into pieces of one length."""
    length = len(ids) // count
    return np.ascontiguousarray(ids[: length * count].reshape(count, length).T)


def _write(path: Path, text: str, case: str, cell: str) -> int:
    """A file of all that a contestant needs; how many tokens there are."""
    corpus = read_corpus(text, "char")
    vocabulary = Vocabulary.build(corpus, "char")
    ids = vocabulary.encode(corpus)
    sizes = find(case)._replace(I=len(vocabulary))
    end = len(ids) - int(len(ids) * _KEPT)
    params = weights(sizes, cell, "float32", np.random.default_rng(0))
    # Small, as in Zaremba's models: it learns in fewer steps than from a variance of 1.
    params["embedding.weight"] *= 0.1
    np.savez(
        path,
        train=_streams(ids[:end], sizes.B),
        kept=_streams(ids[end:], _STREAMS),
        **params,
    )
    return len(vocabulary)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.loss", description=__doc__)
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--target", type=float, default=1.5, help="nats a character")
    parser.add_argument("--case", default="T64B32I65H512", help="as of python -m bench")
    parser.add_argument("--cell", choices=CELLS, default="lstm")
    parser.add_argument("--contestants", default="fastrnn,torch")
    parser.add_argument("--norm", type=float, default=5.0, help="gradients are clipped to it")
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=50, help="steps between validations")
    parser.add_argument("--steps", type=int, default=3000, help="at most")
    parser.add_argument("--rate", type=float, default=0.003, help="of Adam, falls as a cosine does")
    options = parser.parse_args()
    racing: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    start: dict[str, float] = {}
    reached: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.npz"
        size = _write(path, options.text, options.case, options.cell)
        work = {"case": options.case, "cell": options.cell, "path": str(path), "size": size}
        work |= {"norm": options.norm, "dropout": options.dropout}
        for name in options.contestants.split(","):
            process = start_worker(contestant(name), {}, options.threads)
            missing = process.ask(do="begin", **work).get("failed")
            if missing:
                print(f"{name}: {missing}", file=sys.stderr)
                process.end()
                continue
            racing[name] = process
            seconds[name] = 0.0
            start[name] = _ask(process, do="validate")["loss"]
        if not racing:
            return 1
        if max(start.values()) - min(start.values()) > _GATE:
            raise RuntimeError(f"expected the same loss of all before the first step, got {start}")
        for steps in range(options.every, options.steps + 1, options.every):
            for name, process in list(racing.items()):
                rate = options.rate * 0.5 * (1 + math.cos(math.pi * steps / options.steps))
                found = _ask(process, do="learn", steps=options.every, rate=rate)
                seconds[name] += found["seconds"]
                loss = _ask(process, do="validate")["loss"]
                print(
                    f"{name:8} {steps:5} steps {seconds[name]:7.1f} s  "
                    f"training {found['loss']:.4f}  validation {loss:.4f}",
                    flush=True,
                )
                if loss <= options.target:
                    reached[name] = seconds[name]
                    racing.pop(name).end()
    for process in racing.values():
        process.end()
    for name, time in reached.items():
        print(f"{name}: {options.target} after {time:.1f} s")
    return 1 if racing else 0


def _ask(process: Any, **request: Any) -> dict[str, Any]:
    answer = process.ask(**request)
    if "failed" in answer:
        raise RuntimeError(answer["failed"])
    return answer


if __name__ == "__main__":
    sys.exit(main())
