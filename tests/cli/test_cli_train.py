"""`fastrnn train`: what it reports, saves and takes."""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import (
    FOX,
    KEYS,
    LIMIT,
    NO_NOISE,
    PLAIN_GRU,
    PLAIN_LSTM,
    TINY,
    WINDOWS,
    check_same_run,
    command,
    environment,
    files,
    posix,
    spawn,
)
from helpers import threads as use_threads

import fastrnn
import fastrnn.cli
from fastrnn import checkpoint, parallel
from fastrnn.cli import main
from fastrnn.models import CELL_NAMES, LanguageModel
from fastrnn.optim import OPTIMIZERS, SCHEDULES
from fastrnn.train import load_model


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
