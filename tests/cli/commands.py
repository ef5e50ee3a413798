"""What the tests of the command line share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import same_results

import fastrnn
import fastrnn.cli
from fastrnn import checkpoint

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
