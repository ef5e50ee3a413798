"""A directory and commands for each test of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import (
    FOX,
    LIMITED,
    TINY,
)

from fastrnn.cli import main


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
