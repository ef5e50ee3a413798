"""Time until a language model has learnt a text so far that its loss on the end of it is TARGET.

    python -m bench.loss TEXT

The same model from the same weights, the same optimiser, text and order for fastrnn and PyTorch, in
a process each, which take turns; only what dropout drops is drawn by each library for itself. What
counts is the time of training steps, not of the validations between them. With another seed both
need a few more or fewer steps: the time of a step is the steadier figure.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import CELLS, Case, find
from bench.language import weights
from bench.peers import NAMES, Contestant
from bench.runner import Process, start_worker
from fastrnn.text import Vocabulary, read_corpus

# The share of the text that is kept for validation, in so many streams.
_KEPT, _STREAMS = 0.05, 32
# Nats between the losses of contestants before the first step.
_GATE = 1e-5
# Seconds for the steps between two validations.
_PATIENCE = 1800


def _streams(ids: np.ndarray, count: int, least: int) -> np.ndarray:
    """(T, count): the ids cut into pieces of one length, which has to be above `least`."""
    length = len(ids) // count
    if length <= least:
        raise ValueError(
            f"TEXT: expected more than {count * (least + 1)} characters to make {count} streams "
            f"of, got {len(ids)}"
        )
    return np.ascontiguousarray(ids[: length * count].reshape(count, length).T)


def _write(path: Path, text: str, case: Case, cell: str) -> int:
    """A file of all that a contestant needs; how many tokens there are."""
    corpus = read_corpus(text, "char")
    vocabulary = Vocabulary.build(corpus, "char")
    ids = vocabulary.encode(corpus)
    end = len(ids) - int(len(ids) * _KEPT)
    case = case._replace(I=len(vocabulary))
    params = weights(case, cell, "float32", np.random.default_rng(0))
    # From a variance of 1, as PyTorch's begin, no run of ours came to 1.5.
    params["embedding.weight"] *= 0.1
    train, kept = _streams(ids[:end], case.B, case.T), _streams(ids[end:], _STREAMS, 1)
    np.savez(path, train=train, kept=kept, **params)
    return len(vocabulary)


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text!r}")
    return int(text)


def _case(text: str) -> Case:
    try:
        return find(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(NAMES) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(NAMES)}, got {text}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.loss", description=__doc__)
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--target", type=float, default=1.5, help="nats a character")
    parser.add_argument(
        "--case", type=_case, default="T64B32I65H512", help="I is that of the text in any case"
    )
    parser.add_argument("--cell", choices=CELLS, default="lstm")
    parser.add_argument("--contestants", type=_names, default="fastrnn,torch")
    parser.add_argument("--norm", type=float, default=5.0, help="gradients are clipped to it")
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--threads", type=_number, default=2)
    parser.add_argument("--every", type=_number, default=50, help="steps between validations")
    parser.add_argument("--steps", type=_number, default=2500, help="at most")
    parser.add_argument("--rate", type=float, default=0.003, help="of Adam, falls as a cosine does")
    parser.add_argument("--seed", type=int, default=0, help="of dropout")
    return parser


def _ask(process: Process, **request: Any) -> dict[str, Any]:
    answer = process.ask(patience=_PATIENCE, **request)
    if "failed" in answer:
        raise RuntimeError(answer["failed"])
    return answer


def _race(racing: dict[str, Process], options: argparse.Namespace) -> int:
    """Turns until all have reached the target, or no step is left."""
    seconds = dict.fromkeys(racing, 0.0)
    waiting = dict(racing)
    for begin in range(0, options.steps, options.every):
        end = min(begin + options.every, options.steps)
        turns = (math.pi * step / options.steps for step in range(begin, end))
        rates = [options.rate * (1 + math.cos(turn)) / 2 for turn in turns]
        # Nobody always runs after the same one.
        for name in sorted(waiting, reverse=bool(begin // options.every % 2)):
            # The threads of the one before may still spin.
            time.sleep(0.05)
            found = _ask(racing[name], do="learn", rates=rates)
            loss = _ask(racing[name], do="validate")["loss"]
            seconds[name] += found["seconds"]
            print(
                f"{name:8} {end:5} steps {seconds[name]:7.1f} s  "
                f"training {found['loss']:.4f}  validation {loss:.4f}",
                flush=True,
            )
            if loss <= options.target:
                del waiting[name]
                each = 1e3 * seconds[name] / end
                print(f"{name}: {options.target} after {seconds[name]:.1f} s, {each:.1f} ms a step")
    return 1 if waiting else 0


def main() -> int:
    """The command line."""
    parser = _parser()
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        path = Path(folder) / "text.npz"
        try:
            size = _write(path, options.text, options.case, options.cell)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        racing: dict[str, Process] = {}
        start: dict[str, float] = {}
        for name in options.contestants:
            process = start_worker(Contestant(name), {}, options.threads)
            ends.callback(process.end)
            answer = process.ask(
                do="begin",
                case=options.case.name,
                cell=options.cell,
                path=str(path),
                size=size,
                norm=options.norm,
                dropout=options.dropout,
                seed=options.seed,
            )
            if "failed" in answer:
                print(f"{name}: {answer['failed']}", file=sys.stderr)
                continue
            racing[name] = process
            start[name] = _ask(process, do="validate")["loss"]
        if not racing or ("fastrnn" in options.contestants and "fastrnn" not in racing):
            return 1
        if not max(start.values()) - min(start.values()) <= _GATE:
            raise RuntimeError(f"expected the same loss of all before the first step, got {start}")
        return _race(racing, options)


if __name__ == "__main__":
    sys.exit(main())
