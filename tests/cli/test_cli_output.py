"""What commands say of themselves, and where nobody listens."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from commands import (
    files,
    posix,
    spawn,
)


def test_the_version(cli):
    done = cli("--version")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"fastrnn (\d+\.\d+\.\d+|not installed as a package)\n", done.out)


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
