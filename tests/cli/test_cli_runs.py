"""Runs that are interrupted, killed and resumed."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import (
    FOX,
    KEYS,
    LIMIT,
    TINY,
    WINDOWS,
    check_refused,
    check_same_run,
    command,
    environment,
    files,
    posix,
    spawn,
)

from fastrnn import checkpoint
from fastrnn.models import CELL_NAMES, LanguageModel
from fastrnn.train import load_model


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
