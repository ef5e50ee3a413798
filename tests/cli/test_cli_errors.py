"""Commands that are refused: one line, and nothing is touched."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import (
    FOX,
    TINY,
    check_refused,
    files,
    posix,
    spawn,
)
from safetensors.numpy import save_file

import fastrnn
import fastrnn.cli
from fastrnn import checkpoint

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
