"""`fastrnn train`, `sample`, `score` and `info`.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 training
diverged, 2 something given was wrong (one line says what), 130 stopped by Ctrl-C (after saving).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fastrnn import checkpoint, parallel
from fastrnn.generate import generate
from fastrnn.models import CELL_NAMES, LanguageModel
from fastrnn.optim import OPTIMIZERS, SCHEDULES
from fastrnn.score import score
from fastrnn.text import LEVELS, Vocabulary, default_corpus, read_corpus
from fastrnn.train import FORMAT, Callback, Diverged, Settings, Trainer, load_model, settings_from

_DEFAULT_OUT = "model.safetensors"
_DEFAULT_AVERAGE = 0.99
_DEFAULT_HIDDEN = 256
_DEFAULT_MINUTES = 0.75
_WORDS = 30_000
# What is drawn in training.
_CHANCES = {
    "--dropout": "between layers and before the output",
    "--input-dropout": "of what goes into the first layer",
    "--embedding-dropout": "of whole vectors",
    "--recurrent-dropout": "of h in products",
    "--weight-dropout": "of weights on h",
    "--zoneout": "of units of h that stay",
}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


class _Parser(argparse.ArgumentParser):
    """One line for an error, without the usage."""

    def error(self, message: str) -> NoReturn:
        _fail(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastrnn", description="Train and run recurrent language models on a CPU."
    )
    parser.add_argument("--version", action="version", version=f"fastrnn {_version('fastrnn')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a language model on a text")
    add = train.add_argument
    add("corpus", nargs="?", metavar="CORPUS", help="a text file; without one, an embedded text")
    add("--out", metavar="FILE", help=f"where to save (default {_DEFAULT_OUT}, or --resume's file)")
    add("--level", choices=LEVELS, help="what a token is (default char)")
    add("--cell", choices=CELL_NAMES, help="default lstm")
    add("--hidden", type=int, metavar="N", help=f"units of a layer (default {_DEFAULT_HIDDEN})")
    add("--layers", type=int, metavar="N", help="default 1")
    add("--embedding", type=int, metavar="N", help="width; 0 for none (default as --hidden)")
    for option, of in _CHANCES.items():
        add(option, type=float, metavar="P", help=f"{of} (default 0)")
    # What is not given is None: a resumed run refuses what is.
    switch: dict[str, Any] = {"action": "store_const", "const": True}
    add("--locked-dropout", **switch, help="one mask for all steps of a window")
    add("--layer-norm", **switch, help="normalise in lstm or gru")
    add("--proj", type=int, metavar="P", help="units of h of an lstm (default: no projection)")
    add("--init", metavar="NAME", help="how weights begin: pytorch (default) or glorot")
    add("--forget-bias", type=float, metavar="X", help="where that of an lstm begins")
    add("--reset-before", **switch | {"const": False}, help="reset a gru's h before its product")
    add("--seq-len", type=int, metavar="N", help="steps of backpropagation (default 64)")
    add("--batch", type=int, metavar="N", help="texts read side by side (default 32)")
    add("--lr", type=float, metavar="X", help="learning rate (default 0.002)")
    add("--clip-norm", type=float, metavar="X", help="largest gradient norm, 0: none (default 5)")
    add("--optimizer", choices=tuple(OPTIMIZERS), help="default adam")
    add("--schedule", choices=tuple(SCHEDULES), help="of the learning rate (default constant)")
    add("--average", type=float, metavar="X", help="of the weights kept, 0: none (default 0.99)")
    add("--val-fraction", type=float, metavar="X", help="kept for validation (default 0.05)")
    limits = train.add_mutually_exclusive_group()
    limits.add_argument("--epochs", type=float, metavar="N", help="passes over the text")
    limits.add_argument("--steps", type=int, metavar="N", help="steps in all, with --resume too")
    limits.add_argument("--minutes", type=float, metavar="M", help=f"default {_DEFAULT_MINUTES}")
    add("--seed", type=int, metavar="S", help="of weights and dropout (default 0)")
    add(
        "--threads", type=int, metavar="N", help="default: all processors that this process may use"
    )
    add("--resume", metavar="MODEL", help="go on with a saved run; its settings hold")
    add("--quiet", action="store_true", help="no progress")
    add("--json", action="store_true", help="end with a line of JSON")

    sample = commands.add_parser("sample", help="let a model write")
    add = sample.add_argument
    add("model", metavar="MODEL")
    add("--prompt", default="", metavar="TEXT", help="what the text begins with")
    add("--length", type=int, default=500, metavar="N", help="tokens to write (default 500)")
    add("--temperature", type=float, default=1.0, metavar="X", help="default 1")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that make up P")
    add("--greedy", action="store_true", help="always the likeliest token")
    add("--seed", type=int, metavar="S", help="the same seed gives the same text")
    add("--threads", type=int, metavar="N")

    judge = commands.add_parser("score", help="how likely a model finds a text, line by line")
    add = judge.add_argument
    add("model", metavar="MODEL")
    source = judge.add_mutually_exclusive_group(required=True)
    source.add_argument("text", nargs="?", metavar="TEXT", help="each line is a sentence")
    source.add_argument("--file", metavar="F", help="a text file, each line a sentence")
    add("--json", action="store_true", help="one JSON object: lines, and the sum of them")
    add("--threads", type=int, metavar="N")

    commands.add_parser("info", help="versions, CPU, threads and caches, for bug reports")
    return parser


class _Progress(Callback):
    """A bar on a terminal, else a line at every validation and now and then."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._said = 0.0

    def on_start(self, trainer: Trainer) -> None:
        self._began, self._before = time.perf_counter(), trainer.tokens
        if sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=trainer.total, initial=trainer.step, unit="step", leave=False)

    def _rate(self, trainer: Trainer) -> float:
        return (trainer.tokens - self._before) / (time.perf_counter() - self._began)

    def on_step(self, trainer: Trainer) -> None:
        if self._bar is not None:
            note = f"loss {trainer.loss:.3f}, {self._rate(trainer) / 1e3:.0f}k tokens/s"
            minutes = trainer.settings.minutes
            if minutes is not None:
                note += f", {max(0.0, 60 * minutes - trainer.seconds):.0f} s left"
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
        elif time.perf_counter() - self._said > 10:
            self._line(trainer, f"loss {trainer.loss:.4f}")

    def on_validation(self, trainer: Trainer) -> None:
        text = f"train loss {trainer.train_loss:.4f}"
        if not math.isnan(trainer.val_loss):
            text += f", validation loss {trainer.val_loss:.4f}"
        if self._bar is not None:
            self._bar.write(f"step {trainer.step}: {text}", file=sys.stderr)
        else:
            self._line(trainer, text)

    def _line(self, trainer: Trainer, text: str) -> None:
        self._said = time.perf_counter()
        of = f" of {trainer.total}" if trainer.total else ""
        rate = self._rate(trainer) / 1e3
        print(f"step {trainer.step}{of}: {text}, {rate:.0f}k tokens/s", file=sys.stderr, flush=True)

    def on_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def _signals() -> Iterator[dict[str, int]]:
    """Ctrl-C and SIGTERM ask the run to end after its step; a second Ctrl-C ends it at once."""
    asked: dict[str, int] = {}

    def ask(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked["signal"] = number

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _encode(vocabulary: Vocabulary, text: str | bytes) -> np.ndarray:
    if vocabulary.level == "byte" and isinstance(text, str):
        # Arguments hold bytes that are no UTF-8 as lone surrogates.
        text = text.encode(errors="surrogateescape")
    return vocabulary.encode(text)


def _boundary(vocabulary: Vocabulary) -> int:
    """The token that stands between sentences: <eos> for words, else the newline."""
    if vocabulary.level == "word":
        return vocabulary.eos_id
    newline = _encode(vocabulary, "\n")
    return vocabulary.eos_id if newline[0] == vocabulary.unk_id else int(newline[0])


def _digest(tokens: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest()


def _given(options: argparse.Namespace, *names: str) -> list[str]:
    return [f"--{n.replace('_', '-')}" for n in names if getattr(options, n) is not None]


# Options, and the arguments that they are.
_MODEL_OPTIONS = {
    "cell": "cell",
    "hidden": "hidden_size",
    "layers": "num_layers",
    "embedding": "embedding_size",
    "dropout": "dropout",
    "input_dropout": "input_dropout",
    "embedding_dropout": "embedding_dropout",
    "recurrent_dropout": "recurrent_dropout",
    "weight_dropout": "weight_dropout",
    "zoneout": "zoneout",
    "locked_dropout": "locked_dropout",
    "layer_norm": "layer_norm",
    "proj": "proj_size",
    "init": "init",
    "forget_bias": "forget_bias",
    "reset_before": "reset_after",
}
_RUN_OPTIONS = {
    "seq_len": "tbptt_steps",
    "batch": "batch",
    "lr": "lr",
    "clip_norm": "clip_norm",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "average": "average",
    "val_fraction": "val_fraction",
    "seed": "seed",
}
_LIMITS = ("steps", "epochs", "minutes")


def _chosen(options: argparse.Namespace, names: Mapping[str, str]) -> dict[str, Any]:
    """Values of the options that were given, by the names of the arguments that they are."""
    values = {name: getattr(options, option) for option, name in names.items()}
    return {name: value for name, value in values.items() if value is not None}


def _new_run(options: argparse.Namespace) -> tuple[LanguageModel, Vocabulary, np.ndarray, Settings]:
    level = options.level or "char"
    chosen = _chosen(options, _RUN_OPTIONS)
    chosen.setdefault("average", _DEFAULT_AVERAGE)
    chosen |= {name: getattr(options, name) for name in _LIMITS}
    if not any(chosen[name] is not None for name in _LIMITS):
        chosen["minutes"] = _DEFAULT_MINUTES
    settings = Settings(**chosen)
    text: str | bytes = (
        read_corpus(options.corpus, level) if options.corpus is not None else default_corpus()
    )
    if level == "byte" and isinstance(text, str):
        text = text.encode()
    vocabulary = Vocabulary.build(text, level, max_size=_WORDS if level == "word" else None)
    tokens = vocabulary.encode(text)
    sizes = {"hidden_size": _DEFAULT_HIDDEN} | _chosen(options, _MODEL_OPTIONS)
    sizes = {"embedding_size": sizes["hidden_size"]} | sizes
    model = LanguageModel(len(vocabulary), **sizes, seed=settings.seed)
    return model, vocabulary, tokens, settings


def _resumed_run(options: argparse.Namespace) -> tuple[Any, ...]:
    """Model, vocabulary, tokens, settings of a saved run, and what to restore."""
    fixed = _given(options, "level", *_MODEL_OPTIONS, *_RUN_OPTIONS)
    if fixed:
        raise ValueError(
            f"--resume: expected only --steps, --epochs or --minutes beside it, got {fixed[0]}; "
            "a resumed run keeps its settings"
        )
    model, vocabulary, tensors, description = _load(options.resume)
    try:
        run, corpus = description["run"], description["corpus"]
        settings = settings_from(run["settings"])
        path, digest = corpus["path"], corpus["sha256"]
        if not isinstance(path, str | None):
            raise TypeError(f"corpus path {path!r:.100}")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{options.resume}: expected a training run, got {error!r}") from None
    except ValueError as error:
        raise ValueError(f"{options.resume}: {error}") from None
    if _given(options, *_LIMITS):
        limits = {name: getattr(options, name) for name in _LIMITS}
        settings = Settings(**(vars(settings) | limits))
    path = path if options.corpus is None else options.corpus
    text: str | bytes = default_corpus() if path is None else read_corpus(path, vocabulary.level)
    tokens = _encode(vocabulary, text)
    if _digest(tokens) != digest:
        name = "the embedded text" if path is None else path
        raise ValueError(f"{name}: expected the text that {options.resume} was trained on")
    options.corpus = path
    return model, vocabulary, tokens, settings, tensors, run


def _check_out(path: str) -> None:
    """Refuse early what could not be saved after the training, and other people's files."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ValueError(f"--out: expected a directory to save in, got {str(target.parent)!r}")
    if target.is_dir():
        raise ValueError(f"--out: expected a file, got the directory {path!r}")
    if target.exists() and not target.is_file():
        raise ValueError(f"--out: expected a file, got the device, pipe or socket {path!r}")
    # A save replaces the file, for which the directory is written to.
    for needed in (target, target.parent):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise ValueError(f"--out: expected permission to write {str(needed)!r}, got none")
    if target.exists() and target.stat().st_size:
        try:
            _, description = checkpoint.load(path)
        except ValueError:
            description = {}
        if description.get("kind") != FORMAT:
            raise ValueError(f"--out: {path!r} exists and is no fastrnn model; choose another name")


def _train(options: argparse.Namespace) -> int:
    out = _DEFAULT_OUT if options.resume is None else options.resume
    out = out if options.out is None else options.out
    restore: tuple[Any, ...] = ()
    if options.resume is not None:
        model, vocabulary, tokens, settings, *restore_list = _resumed_run(options)
        restore = tuple(restore_list)
        _check_out(out)
    else:
        _check_out(out)
        model, vocabulary, tokens, settings = _new_run(options)
    source = {
        "path": None if options.corpus is None else os.path.abspath(options.corpus),
        "sha256": _digest(tokens),
    }
    common = {
        "kind": FORMAT,
        "model": model.config(),
        "vocabulary": vocabulary.to_config(),
        "corpus": source,
    }

    def save(trainer: Trainer) -> None:
        tensors, run = trainer.checkpoint()
        checkpoint.save(out, tensors, common | {"run": run})

    with _signals() as asked:
        callbacks = [] if options.quiet else [_Progress()]
        trainer = Trainer(
            model, tokens, settings, callbacks=callbacks, save=save, stop=lambda: bool(asked)
        )
        if restore:
            trainer.restore(*restore)
        elif not options.quiet:
            count = sum(p.size for p in model.params.values())
            print(
                f"{len(tokens):,} tokens of {len(vocabulary):,} kinds; {model.cell} of "
                f"{count:,} parameters; {parallel.get_num_threads()} threads; first step compiles",
                file=sys.stderr,
            )
        if trainer.finished and not options.quiet:
            print(
                f"{trainer.step} steps are done, which is the limit of this run; give a larger "
                "--steps, --epochs or --minutes to go on",
                file=sys.stderr,
            )
        before, began = trainer.step, trainer.seconds
        trainer.fit()
    # The first step compiles and is not timed.
    timed, seconds = trainer.step - before - 1, trainer.seconds - began
    if not options.quiet and not asked:
        model.load_state_dict(trainer.kept_params)
        prompt = [_boundary(vocabulary)]
        drawn = generate(model, prompt, 300, temperature=0.8, seed=settings.seed)[0]
        print(f"{vocabulary.decode(drawn)}\n")
    if not options.quiet:
        losses = f"loss {trainer.loss:.4f}"
        if not math.isnan(trainer.train_loss):
            losses = f"train loss {trainer.train_loss:.4f}"
        if not math.isnan(trainer.val_loss):
            losses += f", validation loss {trainer.val_loss:.4f}"
        print(f"{trainer.step} steps, {losses} nats per token; saved {out}", file=sys.stderr)
    if options.json:
        figures = {
            "steps": trainer.step,
            "tokens": trainer.tokens,
            "seconds": trainer.seconds,
            "tokens_per_second": (
                timed * settings.batch * settings.tbptt_steps / seconds
                if timed > 0 and seconds > 0
                else 0.0
            ),
            "train_loss": trainer.train_loss,
            "val_loss": trainer.val_loss,
        }
        print(json.dumps({k: None if v != v else v for k, v in figures.items()}))
    return 130 if asked else 0


def _load(path: str) -> tuple[LanguageModel, Vocabulary, dict[str, np.ndarray], dict[str, Any]]:
    model, tensors, description = load_model(path)
    try:
        vocabulary = Vocabulary.from_config(description.get("vocabulary", {}))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if len(vocabulary) != model.vocab_size:
        raise ValueError(
            f"{path}: expected a vocabulary of {model.vocab_size} tokens, got {len(vocabulary)}"
        )
    return model, vocabulary, tensors, description


def _sample(options: argparse.Namespace) -> int:
    model, vocabulary, _, _ = _load(options.model)
    prompt = _encode(vocabulary, options.prompt)
    if unknown := int(np.sum(prompt == vocabulary.unk_id)):
        print(f"--prompt: {unknown} of {len(prompt)} tokens are new to the model", file=sys.stderr)
    if not len(prompt):
        prompt = np.array([_boundary(vocabulary)])
    drawn = generate(
        model,
        prompt,
        options.length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        greedy=options.greedy,
        seed=options.seed,
        eos=vocabulary.eos_id if vocabulary.level != "word" else None,
    )[0]
    whole = np.concatenate([prompt, drawn]) if options.prompt else drawn
    print(vocabulary.decode(whole))
    return 0


def _score(options: argparse.Namespace) -> int:
    model, vocabulary, _, _ = _load(options.model)
    if options.file is not None:
        text: Any = read_corpus(options.file, vocabulary.level)
    else:
        text = options.text
    ends: Any = rb"\r\n|\n|\r" if isinstance(text, bytes) else r"\r\n|\n|\r"
    lines: list[Any] = [line for line in re.split(ends, text) if line.strip()]
    if not lines:
        raise ValueError("text: expected at least one line that is not empty")
    end = _boundary(vocabulary)
    sentences = [np.append(_encode(vocabulary, line), np.int32(end)) for line in lines]
    results = []
    for log_probs in score(model, sentences, end):
        total = float(log_probs.sum())
        results.append(
            {
                "log_prob": total,
                "tokens": len(log_probs),
                "perplexity": math.exp(min(700.0, -total / len(log_probs))),
            }
        )
    log_prob = sum(r["log_prob"] for r in results)
    count = sum(r["tokens"] for r in results)
    whole = {
        "log_prob": log_prob,
        "tokens": count,
        "perplexity": math.exp(min(700.0, -log_prob / count)),
    }
    if options.json:
        print(json.dumps({"lines": results, **whole}))
        return 0
    for line, found in zip(lines, results, strict=True):
        shown = line if isinstance(line, str) else line.decode(errors="replace")
        print(f"{found['log_prob']:.4f}\t{found['perplexity']:.3f}\t{shown}")
    if len(results) > 1:
        print(f"{log_prob:.4f}\t{whole['perplexity']:.3f}\tall, {count} tokens")
    return 0


def _info(options: argparse.Namespace) -> int:
    from fastrnn import gemm, jit, simd

    machine = simd.machine()
    for name in ("fastrnn", "numpy", "numba", "llvmlite", "safetensors", "tqdm"):
        print(f"{name:12} {_version(name)}")
    print(f"{'python':12} {platform.python_version()}, {platform.platform()}")
    print(f"{'cpu':12} {machine.cpu}")
    fused = "fused" if machine.fma else "no fused"
    print(
        f"{'vectors':12} {machine.width * 8} bits, {machine.registers} registers, "
        f"{fused} multiply-add; tile {gemm.ROWS} x {gemm.COLS}"
    )
    print(f"{'threads':12} {parallel.get_num_threads()} of {os.cpu_count()}, own pool")
    print(f"{'cache':12} {jit.cache_directory()}")
    return 0


_COMMANDS = {"train": _train, "sample": _sample, "score": _score, "info": _info}


# What arguments of the library are called here.
_FLAGS = {name: f"--{option.replace('_', '-')}" for option, name in _MODEL_OPTIONS.items()}
_FLAGS |= {"tbptt_steps": "--seq-len", "n": "--threads"}


def _fail(message: str) -> NoReturn:
    name, colon, rest = " ".join(str(message).split()).partition(":")
    one_line = f"{_FLAGS.get(name, name)}{colon}{rest}"
    print(f"fastrnn: error: {one_line}", file=sys.stderr)
    sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that a terminal lacks must not lose the rest.
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        if getattr(options, "threads", None) is not None:
            parallel.set_num_threads(options.threads)
        code = _COMMANDS[options.command](options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader left; Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        code = 130
    except Diverged as error:
        print(f"fastrnn: {error}", file=sys.stderr)
        code = 1
    except MemoryError as error:
        _fail(f"not enough memory: {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        _fail(f"{where}{error.strerror or error}")
    except (ValueError, TypeError, OverflowError) as error:
        _fail(str(error))
    sys.exit(code)


if __name__ == "__main__":
    main()
