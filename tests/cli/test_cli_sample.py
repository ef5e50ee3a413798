"""`fastrnn sample` and `fastrnn score`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from commands import (
    check_refused,
    environment,
    spawn,
)
from test_models import reference_loss_and_grads

from fastrnn.text import Vocabulary
from fastrnn.train import load_model


def test_a_prompt_with_characters_that_the_model_has_never_seen(train, cli):
    train()
    done = cli("sample", "m", "--prompt", "the ☃☃", "--length", 3, "--seed", 1)
    assert (done.code, done.err) == (0, "--prompt: 2 of 6 tokens are new to the model\n")
    assert cli("sample", "m", "--prompt", "the ", "--length", 3, "--seed", 1).err == ""


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
