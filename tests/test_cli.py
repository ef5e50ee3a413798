from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import same_results
from helpers import threads as use_threads
from safetensors.numpy import save_file
from test_models import reference_loss_and_grads

import fastrnn
import fastrnn.cli
from fastrnn import checkpoint, parallel
from fastrnn.cli import main
from fastrnn.models import CELL_NAMES, LanguageModel
from fastrnn.optim import OPTIMIZERS, SCHEDULES
from fastrnn.text import Vocabulary
from fastrnn.train import load_model

# Enough for a cold cache on a slow machine; a hang costs no more than this.
LIMIT = 240
FOX = "the quick brown fox jumps over the lazy dog.\n" * 20
TINY = ("--hidden", "8", "--seq-len", "8", "--batch", "2")
# 855 of the 900 characters are trained on: 427 a stream, windows of 8.
WINDOWS = 53
LIMITED = ("--steps", "150", "--quiet")
KEYS = {"steps", "tokens", "seconds", "tokens_per_second", "train_loss", "val_loss"}


posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX shells, signals and files")

# What a model is made with beside that, and the command line leaves alone.
NO_NOISE = {
    "input_dropout": 0,
    "embedding_dropout": 0,
    "recurrent_dropout": 0,
    "weight_dropout": 0,
    "zoneout": 0,
    "locked_dropout": False,
}
# What a layer has unless told otherwise.
PLAIN = {"bias": True, "proj_size": 0, "learned_state": False, "init": "pytorch"}
PLAIN_GRU = PLAIN | {"reset_after": True, "reset_gate": True, "layer_norm": False}
PLAIN_LSTM = PLAIN | {"peephole": False, "coupled": False, "cell_clip": None}
PLAIN_LSTM |= {"layer_norm": False, "forget_bias": None}


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Every test has a directory of its own, with a corpus."""
    monkeypatch.chdir(tmp_path)
    Path("fox.txt").write_text(FOX)


@pytest.fixture
def cli(capsys):
    """`cli(arguments)` runs a command in this process: exit code, standard output and error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(code=caught.value.code, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def train(cli):
    """Train a tiny model and expect success; the figures of --json."""

    def run(*arguments, corpus="fox.txt", out="m", steps=5):
        limit = [] if steps is None else ["--steps", steps]
        done = cli("train", corpus, *TINY, "--out", out, *limit, "--quiet", "--json", *arguments)
        assert (done.code, done.err) == (0, "")
        return json.loads(done.out)

    return run


@pytest.fixture
def resume(cli):
    def run(*arguments):
        done = cli("train", "--resume", *arguments, "--quiet", "--json")
        assert (done.code, done.err) == (0, "")
        return json.loads(done.out)

    return run


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """A model that knows one line by heart."""
    folder = tmp_path_factory.mktemp("parrot")
    (folder / "abc.txt").write_text("abcd\n" * 200)
    options = ("--hidden", "16", "--seq-len", "10", "--batch", "4", "--lr", "0.02")
    with pytest.raises(SystemExit) as caught:
        main(["train", str(folder / "abc.txt"), "--out", str(folder / "m"), *options, *LIMITED])
    assert caught.value.code == 0
    return str(folder / "m")


def environment(**changes):
    root = str(Path(fastrnn.__file__).parents[1])
    return os.environ | {"PYTHONPATH": root, "PYTHONIOENCODING": "utf-8"} | changes


def command(*arguments):
    return [sys.executable, "-m", "fastrnn.cli", *map(str, arguments)]


def spawn(*arguments, shell=None, **options):
    """Run a command in a process of its own; `shell` is a line of sh with "$@" for the command."""
    line = command(*arguments)
    if shell is not None:
        line = ["sh", "-c", shell, "sh", *line]
    options = {"env": environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(line, timeout=LIMIT, encoding="utf-8", **options)


def files():
    """Everything in the test's directory."""
    return {str(p): p.read_bytes() for p in Path().rglob("*") if p.is_file()}


def check_same_run(got, want):
    """Two files hold the same run: all arrays, the step, the losses."""
    (got_tensors, got_about), (want_tensors, want_about) = map(checkpoint.load, (got, want))
    same_results(got_tensors, want_tensors)
    for about in (got_about, want_about):
        del about["run"]["seconds"], about["run"]["settings"]
    assert json.dumps(got_about) == json.dumps(want_about)


def check_refused(done, *fragments, code=2):
    """Nothing on standard output, one line on standard error that holds all fragments."""
    assert done.code == code, done
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("fastrnn: error: ")
    assert done.err.endswith("\n")
    for fragment in fragments:
        assert fragment in done.err


# Training


def test_train_reports_saves_and_writes():
    before = files()
    done = spawn("train", "fox.txt", *TINY, "--steps", 5, "--json", "--out", "m.safetensors")
    assert done.returncode == 0
    *text, last = done.stdout.splitlines()
    figures = json.loads(last)
    assert figures.keys() == KEYS
    assert (figures["steps"], figures["tokens"]) == (5, 80)
    assert figures["seconds"] > 0
    assert figures["tokens_per_second"] == pytest.approx(64 / figures["seconds"])
    for key in ("train_loss", "val_loss"):
        assert figures[key] == pytest.approx(math.log(30), abs=0.3)
    assert len("\n".join(text)) > 200
    *_, summary = done.stderr.splitlines()
    assert summary == (
        f"5 steps, train loss {figures['train_loss']:.4f}, validation loss "
        f"{figures['val_loss']:.4f} nats per token; saved m.safetensors"
    )
    assert files().keys() - before.keys() == {"m.safetensors"}
    model, _, description = load_model("m.safetensors")
    assert model.hidden_size == 8
    assert description["run"]["step"] == 5


def test_without_a_terminal_progress_is_sparse_lines():
    done = spawn("train", "fox.txt", *TINY, "--steps", WINDOWS + 5, "--out", "m")
    assert "\r" not in done.stderr
    first, *lines, _ = done.stderr.splitlines()
    assert first.startswith("900 tokens of 31 kinds; lstm of 1,103 parameters; ")
    assert [line.split(":")[0] for line in lines] == [
        "step 1 of 58",
        "step 53 of 58",
        "step 58 of 58",
    ]
    assert "loss" in lines[0]
    assert all("train loss" in line and "validation loss" in line for line in lines[1:])


def test_lines_come_at_most_every_ten_seconds(cli, monkeypatch):
    now = [1e6]
    step = LanguageModel.loss_and_grads

    def slow(model, *args, **options):
        now[0] += 4
        return step(model, *args, **options)

    monkeypatch.setattr(LanguageModel, "loss_and_grads", slow)
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(fastrnn.cli, "time", clock)
    done = cli("train", "fox.txt", *TINY, "--steps", 12, "--out", "m")
    steps = [int(line.split()[1]) for line in done.err.splitlines() if line.startswith("step")]
    assert steps == [1, 4, 7, 10, 12]


def read_terminal(master, process):
    """All that a process writes to a terminal."""
    found = b""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        ready, _, _ = select.select([master], [], [], 0.1)
        if ready:
            try:
                piece = os.read(master, 1 << 16)
            except OSError:
                break
            if not piece:
                break
            found += piece
        elif process.poll() is not None:
            break
    return found.decode()


@posix
def test_on_a_terminal_progress_is_a_bar():
    import pty
    import termios

    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    with subprocess.Popen(
        command("train", "fox.txt", *TINY, "--steps", 5, "--json", "--out", "m"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=slave,
        encoding="utf-8",
    ) as process:
        os.close(slave)
        shown = read_terminal(master, process)
        out = process.stdout.read()
        assert process.wait(LIMIT) == 0
    os.close(master)
    assert "0/5" in shown
    assert "step/s" in shown
    assert "\r" in shown
    assert "step 5: train loss" in shown
    assert "\x1b" not in out
    assert json.loads(out.splitlines()[-1])["steps"] == 5


def test_quiet_says_nothing_but_json(cli):
    line = ["train", "fox.txt", *TINY, "--steps", 2, "--quiet", "--out", "m"]
    done = cli(*line)
    assert (done.code, done.out, done.err) == (0, "", "")
    assert Path("m").exists()
    done = cli(*line, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.out.count("\n") == 1
    assert json.loads(done.out).keys() == KEYS


def test_every_option_reaches_the_run(train):
    options = {
        "--level": "word",
        "--cell": "gru",
        "--hidden": 7,
        "--layers": 2,
        "--embedding": 3,
        "--dropout": 0.25,
        "--seq-len": 5,
        "--batch": 4,
        "--lr": 0.01,
        "--clip-norm": 0.5,
        "--optimizer": "adagrad",
        "--schedule": "cosine",
        "--average": 0.5,
        "--val-fraction": 0.1,
        "--seed": 9,
    }
    figures = train(*(part for item in options.items() for part in item), steps=4)
    assert (figures["steps"], figures["tokens"]) == (4, 80)
    model, _, description = load_model("m")
    assert (
        model.config()
        == {
            "vocab_size": 11,
            "hidden_size": 7,
            "cell": "gru",
            "num_layers": 2,
            "embedding_size": 3,
            "dropout": 0.25,
            "dtype": "float32",
        }
        | NO_NOISE
        | PLAIN_GRU
    )
    assert description["run"]["settings"] == {
        "batch": 4,
        "tbptt_steps": 5,
        "lr": 0.01,
        "clip_norm": 0.5,
        "optimizer": "adagrad",
        "schedule": "cosine",
        "steps": 4,
        "epochs": None,
        "minutes": None,
        "average": 0.5,
        "val_fraction": 0.1,
        "val_every": 0,
        "seed": 9,
    }
    assert description["vocabulary"]["level"] == "word"
    assert description["corpus"]["path"] == os.path.abspath("fox.txt")


class Caught(Exception):
    """What a run would have been made of."""


@pytest.mark.parametrize("level", ["char", "byte", "word"])
def test_defaults_are_those_of_the_help(level, monkeypatch):
    def catch(model, tokens, settings, **options):
        raise Caught(model, settings)

    monkeypatch.setattr(fastrnn.cli, "Trainer", catch)
    with pytest.raises(Caught) as caught:
        main(["train", "--level", level] if level != "char" else ["train"])
    model, settings = caught.value.args
    config = model.config()
    del config["vocab_size"]
    assert (
        config
        == {
            "hidden_size": 256,
            "cell": "lstm",
            "num_layers": 1,
            "embedding_size": 256,
            "dropout": 0,
            "dtype": "float32",
        }
        | NO_NOISE
        | PLAIN_LSTM
    )
    assert (settings.batch, settings.tbptt_steps, settings.lr) == (32, 64, 0.002)
    assert (settings.clip_norm, settings.val_fraction, settings.seed) == (5, 0.05, 0)
    assert (settings.optimizer, settings.schedule) == ("adam", "constant")
    assert settings.average == 0.99
    assert (settings.steps, settings.epochs) == (None, None)
    assert settings.minutes > 0


def test_without_a_corpus_there_is_a_text(cli):
    done = cli("train", "--steps", 2, *TINY)
    assert done.code == 0
    assert set(files()) == {"fox.txt", "model.safetensors"}
    assert checkpoint.load("model.safetensors")[1]["corpus"]["path"] is None
    done = cli("train", "--resume", "model.safetensors", "--steps", 3, "--json", "--quiet")
    assert json.loads(done.out)["steps"] == 3


@pytest.mark.parametrize("cell", CELL_NAMES)
@pytest.mark.parametrize("level", ["char", "byte", "word"])
def test_every_cell_on_every_level_trains_samples_and_scores(cell, level, train, cli):
    Path("text.txt").write_text("Zwölf Boxkämpfer jagen Viktor quer über den großen Deich.\n" * 30)
    train("--cell", cell, "--level", level, corpus="text.txt")
    model, _, description = load_model("m")
    assert model.cell == cell
    assert description["vocabulary"]["level"] == level
    assert (model.embedding_size, model.vocab_size > 100) == {
        "char": (8, False),
        "byte": (8, True),
        "word": (8, False),
    }[level]
    done = cli("sample", "m", "--prompt", "Zwölf ", "--length", 20, "--seed", 1)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Zwölf")
    done = cli("score", "m", "Zwölf Boxkämpfer", "--json")
    assert done.code == 0
    count = {"char": 17, "byte": 19, "word": 3}[level]
    assert json.loads(done.out)["tokens"] == count


RICH = [
    (
        ("--proj", "5", "--recurrent-dropout", "0.1", "--forget-bias", "-1", "--zoneout", "0.2"),
        {"proj_size": 5, "recurrent_dropout": 0.1, "forget_bias": -1, "zoneout": 0.2},
    ),
    (
        ("--layer-norm", "--init", "glorot", "--weight-dropout", "0.1", "--input-dropout", "0.2"),
        {"layer_norm": True, "init": "glorot", "weight_dropout": 0.1, "input_dropout": 0.2},
    ),
    (
        ("--cell", "gru", "--reset-before", "--embedding-dropout", "0.3"),
        {"cell": "gru", "reset_after": False, "embedding_dropout": 0.3},
    ),
    (
        ("--cell", "gru", "--dropout", "0.2", "--locked-dropout"),
        {"cell": "gru", "dropout": 0.2, "locked_dropout": True},
    ),
]


@pytest.mark.parametrize(("options", "wanted"), RICH, ids=lambda v: " ".join(v)[:30])
def test_options_reach_the_model_and_a_run_that_goes_on(options, wanted, train, resume, cli):
    train(*options, steps=4, out="whole")
    model, _, _ = load_model("whole")
    changed = {k: v for k, v in model.config().items() if k in wanted}
    assert changed == wanted
    train(*options, steps=2)
    resume("m", "--steps", 4)
    check_same_run("m", "whole")
    done = cli("sample", "m", "--length", 20, "--seed", 1)
    assert (done.code, done.err) == (0, "")
    assert cli("score", "m", "The quick brown fox").code == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_optimiser_and_schedule_trains(optimizer, schedule, train):
    figures = train("--optimizer", optimizer, "--schedule", schedule)
    assert figures["steps"] == 5
    run = checkpoint.load("m")[1]["run"]["settings"]
    assert (run["optimizer"], run["schedule"]) == (optimizer, schedule)


def test_limits(train):
    assert train("--epochs", 0.1, steps=None)["steps"] == 5
    assert train("--epochs", 2, steps=None)["steps"] == 2 * WINDOWS
    assert 1 <= train("--minutes", 1e-9, steps=None)["steps"] <= 2


def test_without_validation_there_is_no_validation_loss(train):
    figures = train("--val-fraction", 0)
    assert figures["val_loss"] is None
    assert figures["train_loss"] > 0


def test_a_single_step_has_no_rate(train):
    figures = train(steps=1)
    assert (figures["steps"], figures["tokens_per_second"]) == (1, 0)


def test_the_seed_decides_everything(train):
    line = ("--dropout", 0.2, "--layers", 2)
    for name, seed in (("m", 1), ("again", 1), ("other", 2)):
        train(*line, "--seed", seed, out=name)
    check_same_run("again", "m")
    weights = [checkpoint.load(name)[0]["params.head.weight"] for name in ("m", "other")]
    assert (weights[0] != weights[1]).any()


def test_threads_change_no_bits(train, cli, monkeypatch):
    with use_threads(1):
        train("--threads", 1)
        assert parallel.get_num_threads() == 1
        train("--threads", 2, out="two")
        assert parallel.get_num_threads() == 2
        check_same_run("two", "m")
        outputs = [
            cli("sample", "m", "--seed", 1, "--threads", n, "--length", 40).out for n in (1, 2)
        ]
        assert outputs[0] == outputs[1]
        outputs = [cli("score", "m", FOX, "--threads", n, "--json").out for n in (1, 2)]
        assert outputs[0] == outputs[1]


def test_a_new_run_may_take_the_place_of_a_model_or_an_empty_file(train):
    Path("m").touch()
    train("--hidden", 4)
    assert load_model("m")[0].hidden_size == 4
    train("--hidden", 6)
    assert load_model("m")[0].hidden_size == 6


@posix
def test_a_link_leads_to_the_model(train):
    Path("folder").mkdir()
    Path("m").symlink_to("folder/real")
    train()
    assert Path("m").is_symlink()
    assert load_model("folder/real")[0].hidden_size == 8


# Bad input: training


BAD_OPTIONS = [
    (("--hidden", "0"), ("--hidden: expected at least 1, got 0",)),
    (("--hidden", "-3"), ("--hidden: expected at least 1, got -3",)),
    (("--hidden", "wide"), ("--hidden", "'wide'")),
    (("--hidden", "1e3"), ("--hidden", "'1e3'")),
    (("--hidden", "100000000000"), ("not enough memory",)),
    (("--layers", "0"), ("--layers: expected at least 1, got 0",)),
    (("--layers", "256"), ("--layers: expected at most 254, got 256",)),
    (("--embedding", "-1"), ("--embedding: expected at least 0, got -1",)),
    (("--dropout", "1"), ("dropout: expected a number in [0, 1), got 1",)),
    (("--dropout", "nan"), ("dropout: expected a number in [0, 1), got nan",)),
    (("--zoneout", "1"), ("--zoneout: expected a number in [0, 1), got 1",)),
    (("--weight-dropout", "2"), ("--weight-dropout: expected a number in [0, 1), got 2",)),
    (("--input-dropout", "1", "--embedding", "8"), ("--input-dropout: expected a number",)),
    (("--input-dropout", "0.1", "--embedding", "0"), ("--input-dropout: expected 0 without",)),
    (("--embedding-dropout", "0.1", "--embedding", "0"), ("--embedding-dropout: expected 0",)),
    (("--locked-dropout",), ("--locked-dropout: expected dropout or input_dropout beside it",)),
    (("--recurrent-dropout", "much"), ("--recurrent-dropout", "'much'")),
    (("--proj", "100"), ("--proj: expected less than hidden_size",)),
    (("--proj", "4", "--cell", "gru"), ("--proj: expected 0, since this cell has no projection",)),
    (("--layer-norm", "--proj", "4"), ("--layer-norm: expected False beside",)),
    (("--layer-norm", "--cell", "rnn"), ("--layer-norm: expected an option that cell='rnn' has",)),
    (("--reset-before",), ("--reset-before: expected an option that cell='lstm' has",)),
    (("--forget-bias", "1", "--cell", "gru"), ("--forget-bias: expected an option that cell=",)),
    (("--forget-bias", "nan"), ("--forget-bias: expected a number",)),
    (("--init", "ones"), ("--init: expected one of pytorch, glorot, identity, got 'ones'",)),
    (("--init", "identity"), ("--init: expected",)),
    (("--seq-len", "0"), ("--seq-len: expected at least 1, got 0",)),
    (("--batch", "0"), ("batch: expected at least 1, got 0",)),
    (("--batch", "10" * 20), ("corpus: expected at least batch * seq_len + 1 = ", "got 855")),
    (("--lr", "0"), ("lr: expected a number in (0, inf), got 0",)),
    (("--lr", "inf"), ("lr: expected a number in (0, inf), got inf",)),
    (("--lr", "fast"), ("--lr", "'fast'")),
    (("--clip-norm", "-1"), ("clip_norm: expected a number in [0, inf), got -1",)),
    (("--val-fraction", "1"), ("val_fraction: expected a number in [0, 1), got 1",)),
    (("--val-fraction", "0.001"), ("val_fraction: expected at least 2 tokens", "0 of 900")),
    (("--val-fraction", "0.999"), ("corpus: expected at least", "got 1")),
    (("--seed", "-1"), ("seed: expected at least 0, got -1",)),
    (("--threads", "0"), ("--threads: expected at least 1 thread, got 0",)),
    (("--level", "bit"), ("--level", "'bit'", "char")),
    (("--cell", "LSTM"), ("--cell", "'LSTM'", "lstm")),
    (("--optimizer", "lion"), ("--optimizer", "'lion'", "adam")),
    (("--schedule", "step"), ("--schedule", "'step'", "cosine")),
    (("--epochs", "1"), ("--epochs", "not allowed with", "--steps")),
    (("--minutes", "1"), ("--minutes", "not allowed with", "--steps")),
    (("--speed", "9"), ("unrecognized arguments: --speed 9",)),
    (("second.txt",), ("unrecognized arguments: second.txt",)),
    (("--hidden",), ("--hidden", "expected one argument")),
    (("--out", "none/m"), ("--out: expected a directory to save in", "none")),
    (("--out", ""), ("--out: expected a file",)),
    (("--out", "folder"), ("--out: expected a file, got the directory 'folder'",)),
    (("--out", "letter.txt"), ("--out: 'letter.txt' exists and is no fastrnn model",)),
    (("--out", "fox.txt"), ("--out: 'fox.txt' exists and is no fastrnn model",)),
    (("--out", "other.safetensors"), ("--out: 'other.safetensors' exists and is no fastrnn",)),
    (("--out", "kind.safetensors"), ("--out: 'kind.safetensors' exists and is no fastrnn",)),
    (("--out", os.devnull), ("--out: expected a file", os.devnull)),
]


@pytest.mark.parametrize(("options", "fragments"), BAD_OPTIONS, ids=lambda v: " ".join(v)[:50])
def test_a_bad_option_of_train_is_one_line(options, fragments, cli):
    Path("folder").mkdir()
    Path("letter.txt").write_text("Dear all")
    save_file({"a": np.zeros(3)}, "other.safetensors")
    checkpoint.save("kind.safetensors", {"a": np.zeros(3)}, {"kind": "something else"})
    before = files()
    check_refused(cli("train", "fox.txt", *TINY, "--steps", "3", *options), *fragments)
    assert files() == before


@pytest.mark.parametrize("limit", [("--steps", "0"), ("--epochs", "0"), ("--minutes", "nan")])
def test_a_bad_limit_is_one_line(limit, cli):
    name = limit[0].strip("-")
    check_refused(cli("train", "fox.txt", *TINY, *limit), f"{name}: expected")
    check_refused(cli("train", "fox.txt", "--schedule", "cosine"), "schedule: cosine expects steps")


def test_a_bad_corpus_is_one_line_that_names_it(cli):
    Path("folder").mkdir()
    Path("empty.txt").touch()
    Path("bom.txt").write_bytes(b"\xef\xbb\xbf")
    Path("binary.txt").write_bytes(bytes(range(256)) * 20)
    Path("latin.txt").write_bytes("Käse ".encode("latin-1") * 100)
    Path("short.txt").write_text("0123456789abcdef")
    before = files()
    for corpus, *fragments in (
        ("missing.txt", "missing.txt: corpus: expected a readable file", "No such file"),
        ("", "corpus: expected a readable file"),
        ("folder", "folder: corpus: expected a readable file, got: a directory"),
        ("empty.txt", "corpus 'empty.txt': expected text, got an empty file"),
        ("bom.txt", "corpus 'bom.txt': expected text, got an empty file"),
        ("binary.txt", "corpus 'binary.txt': expected UTF-8 text", "NUL", "--level byte"),
        ("latin.txt", "corpus 'latin.txt': expected UTF-8 text", "0xE4 at byte 1"),
        ("short.txt", "corpus: expected at least batch * seq_len + 1 = 17 tokens, got 16"),
    ):
        check_refused(cli("train", corpus, *TINY, "--steps", 3), *fragments)
    done = cli("train", "empty.txt", "--level", "byte", *TINY, "--steps", 3)
    check_refused(done, "corpus 'empty.txt': expected at least one byte, got an empty file")
    assert files() == before
    for corpus in ("binary.txt", "latin.txt"):
        assert cli("train", corpus, "--level", "byte", *TINY, "--steps", 3, "--quiet").code == 0


@pytest.mark.parametrize("arguments", [(), ("dance",), ("train", "--hidden", "x"), ("score", "m")])
def test_a_bad_command_line_shows_no_usage(arguments, cli):
    check_refused(cli(*arguments))


def test_errors_of_a_process_are_one_line_too():
    for arguments, fragment in (
        (("train", "missing.txt"), "missing.txt: corpus: expected a readable file"),
        (("train", "fox.txt", "--hidden", "x"), "--hidden"),
    ):
        done = spawn(*arguments)
        result = SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)
        check_refused(result, fragment)


def test_no_permission_to_write_is_found_before_training(cli, train, monkeypatch):
    train()
    Path("folder").mkdir()
    before = files()
    access = os.access
    for denied, out in (("m", "m"), (".", "m"), ("folder", "folder/new")):
        path = os.path.realpath(denied)
        monkeypatch.setattr(
            fastrnn.cli.os, "access", lambda p, mode, path=path: str(p) != path and access(p, mode)
        )
        done = cli("train", "fox.txt", *TINY, "--steps", 3, "--out", out)
        check_refused(done, "--out: expected permission to write", repr(path))
        assert files() == before


@posix
@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may do everything")
def test_what_may_not_be_read_or_written_is_refused(cli, train):
    train()
    train(out="secret")
    Path("secret").chmod(0)
    Path("hidden.txt").write_text(FOX)
    Path("hidden.txt").chmod(0)
    Path("folder").mkdir(0o500)
    Path("m").chmod(0o400)
    before = Path("m").read_bytes()
    check_refused(cli("train", "hidden.txt", *TINY), "hidden.txt", "Permission denied")
    check_refused(cli("sample", "secret"), "secret: cannot load the checkpoint")
    for out in ("folder/m", "m"):
        done = cli("train", "fox.txt", *TINY, "--steps", 3, "--out", out)
        check_refused(done, "--out: expected permission to write")
    assert Path("m").read_bytes() == before


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(fails, cli, train, monkeypatch):
    train()
    before = files()

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.os, fails, full)
    done = cli("train", "fox.txt", *TINY, "--steps", 3, "--out", "m", "--quiet")
    check_refused(done, "m: cannot save the checkpoint: No space left on device")
    done = cli("train", "--resume", "m", "--steps", 9, "--quiet")
    check_refused(done, "m: cannot save the checkpoint: No space left on device")
    assert files() == before


@posix
def test_a_file_that_may_not_grow_leaves_the_old_one(train):
    train()
    before = files()
    limited = 'ulimit -f 8 && exec "$@"'
    done = spawn("train", "--resume", "m", "--steps", 9, "--quiet", shell=limited)
    result = SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)
    check_refused(result, "m: cannot save the checkpoint: File too large")
    assert files() == before


# Stopping and resuming


def interrupt_at(step, monkeypatch, *signals):
    """Send signals to this process within a step of the training."""
    forward = LanguageModel.loss_and_grads
    steps = []

    def interrupted(*args, **options):
        steps.append(1)
        if len(steps) == step:
            for number in signals:
                signal.raise_signal(number)
        return forward(*args, **options)

    monkeypatch.setattr(LanguageModel, "loss_and_grads", interrupted)


RUN = ("--layers", "2", "--dropout", "0.2", "--lr", "0.05")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 4, WINDOWS, WINDOWS + 2, WINDOWS + 5])
def test_an_interrupted_and_resumed_run_has_the_bits_of_an_unbroken_one(
    number, step, cli, train, resume, monkeypatch
):
    last = WINDOWS + 5
    whole = train(*RUN, out="whole", steps=last)
    line = ["train", "fox.txt", *TINY, *RUN, "--steps", last, "--out", "m", "--quiet", "--json"]
    with monkeypatch.context() as patch:
        interrupt_at(step, patch, number)
        done = cli(*line)
    assert (done.code, done.err) == (130, "")
    figures = json.loads(done.out)
    assert figures.keys() == KEYS
    assert figures["steps"] == step
    assert checkpoint.load("m")[1]["run"]["step"] == step
    figures = resume("m")
    check_same_run("m", "whole")
    for key in ("steps", "tokens", "train_loss", "val_loss"):
        assert figures[key] == whole[key]


def test_an_interrupted_run_says_so_and_writes_no_sample(cli, monkeypatch):
    interrupt_at(3, monkeypatch, signal.SIGINT)
    done = cli("train", "fox.txt", *TINY, "--steps", 9, "--out", "m")
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-1].startswith("3 steps, ")
    assert done.err.splitlines()[-1].endswith("; saved m")


def test_a_second_interrupt_ends_at_once(cli, monkeypatch):
    before = files()
    interrupt_at(3, monkeypatch, signal.SIGINT, signal.SIGINT)
    done = cli("train", "fox.txt", *TINY, "--steps", 9, "--out", "m", "--quiet")
    assert (done.code, done.out, done.err) == (130, "", "")
    assert files() == before


def test_signal_handlers_are_restored(cli, train, monkeypatch):
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before = handlers()
    inside = []
    step = LanguageModel.loss_and_grads

    def watched(*args, **options):
        inside.append(handlers())
        return step(*args, **options)

    monkeypatch.setattr(LanguageModel, "loss_and_grads", watched)
    train()
    assert all(found != kept for found, kept in zip(inside[0], before, strict=True))
    assert handlers() == before
    cli("train", "fox.txt", "--lr", "0")
    cli("train", "fox.txt", *TINY, "--steps", 3, "--val-fraction", "0.001")
    assert handlers() == before
    interrupt_at(2, monkeypatch, signal.SIGINT)
    assert cli("train", "fox.txt", *TINY, "--steps", 9, "--out", "m", "--quiet").code == 130
    assert handlers() == before


def test_importing_installs_no_handlers_and_prints_nothing():
    code = (
        "import signal\n"
        "numbers = sorted(signal.valid_signals())\n"
        "before = [signal.getsignal(n) for n in numbers]\n"
        "import fastrnn.cli\n"
        "assert [signal.getsignal(n) for n in numbers] == before\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, timeout=LIMIT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def saved_at(path):
    return Path(path).stat().st_mtime_ns if Path(path).exists() else 0


@contextlib.contextmanager
def endless(*arguments):
    """A process that trains until it is told to stop, past its first step."""
    line = command("train", *arguments, "--steps", 10**7, "--json")
    with subprocess.Popen(
        line,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        try:
            for text in process.stderr:
                if text.startswith("step"):
                    break
            else:
                raise AssertionError(f"ended by itself with {process.wait(LIMIT)}: {text}")
            yield process
        finally:
            process.kill()


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_process_saves_and_leaves_cleanly(number, train, resume):
    with endless("fox.txt", *TINY, *RUN, "--out", "m") as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert "Traceback" not in err
    steps = json.loads(out)["steps"]
    assert checkpoint.load("m")[1]["run"]["step"] == steps
    assert set(files()) == {"fox.txt", "m"}
    resume("m", "--steps", steps + 3)
    train(*RUN, out="whole", steps=steps + 3)
    check_same_run("m", "whole")


def test_a_kill_at_any_moment_leaves_a_whole_file(cli, resume):
    # One window: every step saves.
    Path("text.txt").write_text(FOX[:24])
    line = (*TINY, "--val-fraction", 0.1)
    delays = random.Random(0)
    first = ("text.txt", *line, "--out", "m")
    steps = 0
    for _ in range(3):
        before = saved_at("m")
        with endless(*first) as process:
            while saved_at("m") == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(delays.uniform(0, 0.2))
            process.kill()
            process.wait(LIMIT)
        model, _, description = load_model("m")
        assert all(np.isfinite(value).all() for value in model.params.values())
        assert description["run"]["step"] > steps
        steps = description["run"]["step"]
        first = ("--resume", "m")
    assert steps > 0
    resume("m", "--steps", steps + 3)
    assert cli("train", "text.txt", *line, "--out", "whole", "--steps", steps + 3).code == 0
    check_same_run("m", "whole")


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_a_resumed_run_that_goes_on_equals_a_long_one(cell, train, resume):
    train(*RUN, "--cell", cell, steps=7)
    before = files()
    figures = resume("m", "--steps", 13, "--out", "longer")
    assert files()["m"] == before["m"]
    whole = train(*RUN, "--cell", cell, out="whole", steps=13)
    check_same_run("longer", "whole")
    for key in ("steps", "tokens", "train_loss", "val_loss"):
        assert figures[key] == whole[key]
    assert checkpoint.load("longer")[1]["run"]["settings"]["steps"] == 13
    resume("m", "--steps", 13)
    check_same_run("m", "whole")


def test_resume_takes_another_kind_of_limit(train, resume):
    train(steps=7)
    assert resume("m", "--epochs", 0.2)["steps"] == 11
    assert resume("m", "--epochs", 0.1)["steps"] == 11


def test_resuming_a_finished_run_says_so(train, cli):
    train()
    done = cli("train", "--resume", "m")
    assert done.code == 0
    assert "5 steps are done, which is the limit of this run; give a larger --steps" in done.err


def test_the_version(cli):
    done = cli("--version")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"fastrnn (\d+\.\d+\.\d+|not installed as a package)\n", done.out)


def test_a_prompt_with_characters_that_the_model_has_never_seen(train, cli):
    train()
    done = cli("sample", "m", "--prompt", "the ☃☃", "--length", 3, "--seed", 1)
    assert (done.code, done.err) == (0, "--prompt: 2 of 6 tokens are new to the model\n")
    assert cli("sample", "m", "--prompt", "the ", "--length", 3, "--seed", 1).err == ""


def test_a_finished_run_is_only_saved_again(train, resume):
    figures = train()
    again = resume("m", "--out", "copy")
    check_same_run("copy", "m")
    assert again["tokens_per_second"] == 0
    for key in ("steps", "tokens", "train_loss", "val_loss"):
        assert again[key] == figures[key]


def test_resume_finds_the_corpus_or_takes_it_from_where_it_is_now(train, resume, cli, monkeypatch):
    train(steps=3)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert resume("../m", "--steps", 4)["steps"] == 4
    shutil.move("../fox.txt", "moved.txt")
    done = cli("train", "--resume", "../m", "--steps", 5)
    check_refused(done, "fox.txt: corpus: expected a readable file")
    assert resume("../m", "moved.txt", "--steps", 5)["steps"] == 5
    # The new place is kept.
    assert resume("../m", "--steps", 6)["steps"] == 6


@pytest.mark.parametrize(
    "option",
    [
        ("--level", "char"),
        ("--cell", "lstm"),
        ("--hidden", "8"),
        ("--layers", "1"),
        ("--embedding", "0"),
        ("--dropout", "0"),
        ("--input-dropout", "0"),
        ("--embedding-dropout", "0"),
        ("--recurrent-dropout", "0"),
        ("--weight-dropout", "0"),
        ("--zoneout", "0"),
        ("--locked-dropout",),
        ("--layer-norm",),
        ("--proj", "0"),
        ("--init", "pytorch"),
        ("--forget-bias", "0"),
        ("--reset-before",),
        ("--seq-len", "8"),
        ("--batch", "2"),
        ("--lr", "0.1"),
        ("--clip-norm", "5"),
        ("--optimizer", "adam"),
        ("--schedule", "plateau"),
        ("--val-fraction", "0.1"),
        ("--seed", "1"),
    ],
    ids=lambda option: option[0],
)
def test_an_option_that_a_saved_run_has_fixed_is_refused(option, train, cli):
    train()
    before = files()
    done = cli("train", "--resume", "m", "--steps", 9, *option)
    check_refused(done, "--resume: expected only", f"got {option[0]};")
    assert files() == before


def test_another_text_is_refused(train, cli):
    train()
    Path("other.txt").write_text(FOX.replace("fox", "cat"))
    before = files()
    done = cli("train", "other.txt", "--resume", "m", "--steps", 9)
    check_refused(done, "other.txt: expected the text that m was trained on")
    Path("fox.txt").write_text(FOX + "more")
    done = cli("train", "--resume", "m", "--steps", 9)
    check_refused(done, "fox.txt: expected the text that m was trained on")
    assert files() | {"fox.txt": b""} == before | {"fox.txt": b""}


# Divergence


def test_a_loss_that_is_not_finite_stops_and_harms_no_file(train):
    train()
    before = files()
    line = ("--optimizer", "sgd", "--lr", "1e38", "--clip-norm", "0", "--steps", 500)
    done = spawn("train", "fox.txt", *TINY, *line, "--out", "m", "--quiet", "--json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("fastrnn: step ")
    step = int(done.stderr.split()[2].rstrip(":"))
    assert 1 < step <= WINDOWS
    assert "try a smaller lr (now 1e+38) or clip_norm 5 (now none)" in done.stderr
    assert files() == before


@pytest.mark.parametrize("poisoned", ["loss", "weights"])
def test_the_last_good_checkpoint_is_kept_and_can_be_resumed(
    poisoned, cli, train, resume, monkeypatch
):
    step = LanguageModel.loss_and_grads
    steps = []

    def spoil(model, *args, **options):
        loss, grads, state = step(model, *args, **options)
        steps.append(1)
        if len(steps) == 2 * WINDOWS:
            if poisoned == "loss":
                loss = math.nan
            else:
                # The step itself is fine, its result is not.
                model.params["head.bias"][3] = np.inf
        return loss, grads, state

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "loss_and_grads", spoil)
        done = cli("train", "fox.txt", *TINY, "--steps", 150, "--out", "m", "--quiet")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"fastrnn: step {2 * WINDOWS}: expected ")
    assert done.err.count("\n") == 1
    assert checkpoint.load("m")[1]["run"]["step"] == WINDOWS
    resume("m", "--steps", WINDOWS + 4)
    train(out="whole", steps=WINDOWS + 4)
    check_same_run("m", "whole")


# Sampling


def test_a_sample_is_a_prompt_and_what_follows(parrot, cli):
    done = cli("sample", parrot, "--prompt", "ab", "--length", 9, "--greedy")
    assert (done.code, done.out, done.err) == (0, "abcd\nabcd\na\n", "")
    # Without a prompt a line begins, which is not written.
    assert cli("sample", parrot, "--length", 6, "--greedy").out == "abcd\na\n"


def test_the_same_seed_writes_the_same_text(train, cli):
    train("--level", "byte")

    def sample(*options):
        done = cli("sample", "m", "--prompt", "the ", "--length", 60, *options)
        assert (done.code, done.err) == (0, "")
        return done.out

    text = sample("--seed", 1)
    assert text.startswith("the ")
    assert sample("--seed", 1) == text
    assert sample("--seed", 2) != text
    assert len({sample() for _ in range(3)}) == 3
    greedy = sample("--greedy")
    assert greedy != text
    for options in (
        ("--greedy", "--seed", 5),
        ("--top-k", 1),
        ("--top-p", 1e-9),
        ("--temperature", 1e-6),
    ):
        assert sample(*options) == greedy
    assert sample("--seed", 1, "--temperature", 3) != text
    # More tokens than there are, and all of their probability, are no limit.
    assert sample("--seed", 1, "--top-k", 10**30, "--top-p", 1) == text
    few = sample("--seed", 1, "--top-k", 2)
    assert len(set(few)) < len(set(text))


def test_characters_that_a_model_does_not_know_are_shown_as_such(parrot, cli):
    done = cli("sample", parrot, "--prompt", "aé\U0001f98a\udcff", "--length", 2, "--greedy")
    assert (done.code, done.err) == (0, "--prompt: 3 of 4 tokens are new to the model\n")
    assert done.out.startswith("a\ufffd\ufffd\ufffd")


def test_a_prompt_that_is_no_utf8_is_bytes_on_the_byte_level(train, cli):
    train("--level", "byte")
    done = cli("sample", "m", "--prompt", "a\udcff", "--length", 3, "--greedy")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("a\ufffd")
    assert json.loads(cli("score", "m", "a\udcff", "--json").out)["tokens"] == 3


def test_a_terminal_without_a_character_still_shows_the_rest(train):
    Path("text.txt").write_text("ő" * 100)
    train("--val-fraction", 0, corpus="text.txt")
    env = environment(PYTHONIOENCODING="ascii")
    done = spawn("sample", "m", "--prompt", "ő", "--length", 1, "--greedy", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("\\u0151")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--length", "0"), ("length: expected at least 1, got 0",)),
        (("--length", "x"), ("--length", "'x'")),
        (("--length", "1" + "0" * 16), ("not enough memory",)),
        (("--temperature", "0"), ("temperature: expected a number in (0, inf), got 0",)),
        (("--temperature", "-1"), ("temperature: expected a number in (0, inf), got -1",)),
        (("--temperature", "nan"), ("temperature: expected a number in (0, inf), got nan",)),
        (("--top-k", "0"), ("top_k: expected at least 1, got 0",)),
        (("--top-p", "0"), ("top_p: expected a number in (0, inf), got 0",)),
        (("--top-p", "1.5"), ("top_p: expected a number in (0, 1], got 1.5",)),
        (("--seed", "x"), ("--seed", "'x'")),
        (("--threads", "0"), ("--threads: expected at least 1 thread, got 0",)),
        (("second",), ("unrecognized arguments: second",)),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_bad_option_of_sample_is_one_line(options, fragments, parrot, cli):
    check_refused(cli("sample", parrot, *options), *fragments)


# Scoring


def expected_log_prob(path, line):
    """log p of a line and the newline after it, given a newline before it, by the reference."""
    model, _, description = load_model(path)
    vocabulary = Vocabulary.from_config(description["vocabulary"])
    ids = vocabulary.encode(f"\n{line}\n")[:, None]
    loss, _, _ = reference_loss_and_grads(model, ids[:-1], ids[1:])
    return -loss * (len(ids) - 1), len(ids) - 1


@pytest.mark.parametrize("level", ["char", "byte", "word"])
def test_scores_are_sums_of_log_probabilities(level, train, cli):
    train("--level", level, steps=20)
    lines = ["the fox jumps", "x", "over the lazy dog. <unk> Ω"]
    text = f"\n{lines[0]}\n\n{lines[1]}\r\n{lines[2]}"
    Path("lines.txt").write_bytes(text.encode())
    done = cli("score", "m", text, "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert found.keys() == {"lines", "log_prob", "tokens", "perplexity"}
    assert len(found["lines"]) == 3
    for line, got in zip(lines, found["lines"], strict=True):
        log_prob, count = expected_log_prob("m", line)
        assert got.keys() == {"log_prob", "tokens", "perplexity"}
        assert got["tokens"] == count
        assert got["log_prob"] == pytest.approx(log_prob, rel=1e-5)
        assert got["perplexity"] == pytest.approx(math.exp(-got["log_prob"] / count))
    for key in ("log_prob", "tokens"):
        assert found[key] == pytest.approx(sum(got[key] for got in found["lines"]), rel=1e-12)
    whole = math.exp(-found["log_prob"] / found["tokens"])
    assert found["perplexity"] == pytest.approx(whole)
    assert cli("score", "m", "--file", "lines.txt", "--json").out == done.out
    shown = cli("score", "m", "--file", "lines.txt").out.splitlines()
    parts = [line.split("\t") for line in shown]
    assert [part[2] for part in parts] == [*lines, f"all, {found['tokens']} tokens"]
    for part, got in zip(parts, [*found["lines"], found], strict=True):
        assert part[:2] == [f"{got['log_prob']:.4f}", f"{got['perplexity']:.3f}"]


def test_a_model_finds_likely_what_it_knows(parrot, cli):
    known = json.loads(cli("score", parrot, "abcd", "--json").out)
    other = json.loads(cli("score", parrot, "abdc", "--json").out)
    assert known["perplexity"] < 1.1
    assert other["perplexity"] > 2
    done = cli("score", parrot, "abcd")
    assert done.out.count("\n") == 1
    assert done.out.endswith("\tabcd\n")


def test_nothing_to_score_is_one_line(parrot, cli):
    Path("empty.txt").touch()
    Path("blank.txt").write_text("\n\n")
    Path("folder").mkdir()
    for arguments, *fragments in (
        (("",), "text: expected at least one line that is not empty"),
        (("\n\n",), "text: expected at least one line that is not empty"),
        (("--file", "blank.txt"), "text: expected at least one line that is not empty"),
        (("--file", "empty.txt"), "'empty.txt': expected text, got an empty file"),
        (("--file", "missing.txt"), "missing.txt", "No such file"),
        (("--file", "folder"), "folder", "a directory"),
        ((), "TEXT", "--file", "required"),
        (("abc", "--file", "fox.txt"), "--file", "not allowed with", "TEXT"),
    ):
        check_refused(cli("score", parrot, *arguments), *fragments)


# Bad models


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Arrays and description of a saved run of the command."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "fox.txt").write_text(FOX)
    line = ["train", str(folder / "fox.txt"), *TINY, "--steps", "3", "--quiet"]
    with pytest.raises(SystemExit):
        main([*line, "--out", str(folder / "m")])
    return checkpoint.load(folder / "m")


def spoil(good, *path, value):
    """The saved run with another value somewhere in its description."""
    tensors, description = good
    description = json.loads(json.dumps(description))
    inner = description
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    checkpoint.save("bad", tensors, description)


def check_all_refuse(cli, *fragments, commands=("sample", "score", "resume")):
    before = files()
    lines = {
        "sample": ("sample", "bad"),
        "score": ("score", "bad", "the fox"),
        "resume": ("train", "--resume", "bad", "--steps", 9),
    }
    for name in commands:
        check_refused(cli(*lines[name]), *fragments)
    assert files() == before


def test_a_file_that_is_no_model_is_refused_by_name(good, cli):
    check_all_refuse(cli, "bad: cannot load the checkpoint: No such file")
    Path("bad").mkdir()
    check_all_refuse(cli, "bad: cannot load the checkpoint: Is a directory")
    Path("bad").rmdir()
    tensors, description = good
    checkpoint.save("bad", tensors, description)
    content = Path("bad").read_bytes()
    for junk in (
        b"",
        b"x",
        b"\0" * 1000,
        random.Random(0).randbytes(1000),
        FOX.encode(),
        content[:7],
        content[:1000],
        content[:-1],
        content + b"x",
        b"\xff" * 8 + content[8:],
    ):
        Path("bad").write_bytes(junk)
        check_all_refuse(cli, "cannot load the checkpoint 'bad'")
    save_file({"a": np.zeros(3)}, "bad")
    check_all_refuse(cli, "cannot load the checkpoint 'bad'", "another program wrote it")
    checkpoint.save("bad", tensors, {"kind": "a cake"})
    check_all_refuse(cli, "bad: expected a fastrnn language model, got kind 'a cake'")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model",), None),
        (("model",), "lstm"),
        (("model", "hidden_size"), 10**9),
        (("model", "vocab_size"), 10**18),
        (("model", "embedding_size"), 10**12),
        (("model", "num_layers"), 10**9),
        (("model", "cell"), "gru"),
        (("model", "dtype"), "f4,(2"),
        (("vocabulary",), None),
        (("vocabulary",), []),
        (("vocabulary", "level"), "byte"),
        (("vocabulary", "level"), "bit"),
        (("vocabulary", "tokens"), None),
        (("vocabulary", "tokens"), ["<unk>", "<eos>"]),
        (("vocabulary", "tokens"), ["<unk>", "<eos>", "a", "a"]),
        (("vocabulary", "tokens"), [1] * 31),
        (("vocabulary", "more"), 1),
    ],
    ids=str,
)
def test_a_hostile_model_is_refused(path, value, good, cli):
    spoil(good, *path, value=value)
    check_all_refuse(cli, "bad: ", "expected")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("run",), None),
        (("run",), []),
        (("run", "settings"), None),
        (("run", "settings"), 5),
        (("run", "settings", "batch"), 0),
        (("run", "settings", "batch"), "2"),
        (("run", "settings", "lr"), 10**400),
        (("run", "settings", "lr"), [1]),
        (("run", "settings", "optimizer"), "magic"),
        (("run", "settings", "steps"), 2.5),
        (("corpus",), None),
        (("corpus",), "fox.txt"),
        (("corpus", "path"), 0),
        (("corpus", "path"), ["fox.txt"]),
        (("corpus", "sha256"), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_hostile_run_is_not_resumed(path, value, good, cli):
    spoil(good, *path, value=value)
    check_all_refuse(cli, "bad: ", "expected", commands=["resume"])
    # The model itself is well.
    assert cli("score", "bad", "the fox").code == 0


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("run", "step"), -1),
        (("run", "step"), "3"),
        (("run", "seconds"), 10**400),
        (("run", "losses"), 5),
        (("run", "val_loss"), None),
        (("run", "settings", "batch"), 3),
        (("run", "settings", "optimizer"), "sgd"),
        (("run", "settings", "val_fraction"), 0.001),
        (("corpus", "sha256"), "0" * 64),
        (("corpus", "sha256"), 5),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_run_that_contradicts_itself_is_not_resumed(path, value, good, cli):
    spoil(good, *path, value=value)
    check_all_refuse(cli, "expected", commands=["resume"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(value, good, cli):
    tensors, description = good
    weights = tensors["model.head.bias"].copy()
    weights[3] = value
    checkpoint.save("bad", tensors | {"model.head.bias": weights}, description)
    check_all_refuse(cli, "model: expected finite logits", commands=["sample", "score"])


# Streams


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_one_line(parrot):
    with open("/dev/full", "w") as full:
        done = spawn("sample", parrot, stdout=full)
    assert done.returncode == 2
    assert done.stderr == "fastrnn: error: No space left on device\n"


@posix
def test_a_reader_that_leaves_is_no_error_to_speak_of(parrot):
    reader, writer = os.pipe()
    os.close(reader)
    done = spawn("sample", parrot, "--length", 5, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
    Path("lines.txt").write_text("abcd\n" * 5000)
    done = spawn("score", parrot, "--file", "lines.txt", shell='"$@" | head -1')
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert done.stdout.endswith("\tabcd\n")


@posix
def test_closed_streams_are_no_error(parrot):
    done = spawn("score", parrot, "abcd", shell='"$@" >&- 2>&-')
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Information


def test_info_says_what_a_bug_report_needs(cli):
    before = files()
    done = cli("info")
    assert (done.code, done.err) == (0, "")
    found = {line.split()[0] for line in done.out.splitlines()}
    wanted = {"fastrnn", "numpy", "numba", "llvmlite", "python", "cpu", "vectors", "threads"}
    assert wanted | {"cache"} <= found
    assert np.__version__ in done.out
    assert files() == before


def test_help_shows_every_option(cli):
    wanted = {
        (): ["train", "sample", "score", "info"],
        ("train",): [
            *("CORPUS", "--out", "--level", "--cell", "--hidden", "--layers", "--embedding"),
            *("--seq-len", "--batch", "--lr", "--clip-norm", "--dropout", "--epochs"),
            *("--minutes", "--steps", "--val-fraction", "--seed", "--threads", "--resume"),
            *("--input-dropout", "--embedding-dropout", "--recurrent-dropout", "--zoneout"),
            *("--weight-dropout", "--locked-dropout", "--layer-norm", "--proj", "--init"),
            *("--forget-bias", "--reset-before", "--quiet", "--json"),
        ],
        ("sample",): [
            *("MODEL", "--prompt", "--length", "--temperature", "--top-k", "--top-p"),
            *("--greedy", "--seed"),
        ],
        ("score",): ["MODEL", "TEXT", "--file", "--json"],
        ("info",): [],
    }
    for name, options in wanted.items():
        done = cli(*name, "--help")
        assert (done.code, done.err) == (0, "")
        assert all(option in done.out for option in options)
