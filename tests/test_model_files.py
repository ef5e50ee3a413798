"""Models and runs in files: there and back, and whatever else such a file may hold."""

from __future__ import annotations

import errno
import math
import tracemalloc

import numpy as np
import pytest
from helpers import as_parts, same, same_results
from small_runs import (
    NOISE,
    new_model,
    new_settings,
    snapshot,
    stop_after,
)

from fastrnn import checkpoint
from fastrnn.models import CELL_NAMES, LanguageModel
from fastrnn.train import (
    FORMAT,
    Trainer,
    load_model,
    save_model,
)


def test_a_model_round_trips_through_a_file(tmp_path):
    path = tmp_path / "model.safetensors"
    for cell in CELL_NAMES:
        model = new_model(cell=cell, dropout=0.25, embedding_size=3, num_layers=2)
        save_model(path, model, {"note": [1, "two"]})
        again, tensors, description = load_model(path)
        assert again.config() == model.config()
        same_results(again.params, model.params)
        assert description["note"] == [1, "two"]
        assert description["kind"] == FORMAT
        assert sorted(tensors) == sorted(f"model.{key}" for key in model.params)
        tokens = NOISE[:12].reshape(4, 3)
        got, want = again(tokens), model(tokens)
        same(got[0], want[0])
        for a, b in zip(as_parts(got[1]), as_parts(want[1]), strict=True):
            same(a, b)


@pytest.fixture(scope="module")
def good():
    """Arrays and description of a run that was saved halfway."""
    sizes = {"num_layers": 2, "embedding_size": 3, "cell": "gru"}
    settings = new_settings(schedule="plateau", val_every=3)
    trainer = Trainer(new_model(**sizes), NOISE, settings, stop=stop_after(7))
    trainer.fit()
    tensors, run = snapshot(trainer)
    return tensors, {"kind": FORMAT, "model": trainer.model.config(), "run": run}


def write(path, tensors, description):
    checkpoint.save(path, tensors, description)
    return path


def refused(path):
    """The message of the ValueError of loading a file; nothing large may be allocated."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            load_model(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_run_and_a_model_are_the_same_kind_of_file(good, tmp_path):
    model, _, description = load_model(write(tmp_path / "m", *good))
    same_results(model.params, {key: good[0][f"model.{key}"] for key in model.params})
    assert description["run"]["step"] == 7


@pytest.mark.parametrize("kind", [None, "", "fastrnn", 1, ["fastrnn language model"], "x" * 10**6])
def test_a_file_of_another_kind_is_refused(kind, good, tmp_path):
    message = refused(write(tmp_path / "m", good[0], good[1] | {"kind": kind}))
    assert "expected a fastrnn language model, got kind" in message
    assert len(message) < 500


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 10**6},
        {"hidden_size": 10**30},
        {"vocab_size": 10**9},
        {"vocab_size": 0},
        {"embedding_size": 10**8},
        {"embedding_size": 0},
        {"num_layers": 10**9},
        {"num_layers": 0},
        {"num_layers": "2"},
        {"cell": "lstm"},
        {"cell": {"a": 1}},
        {"dropout": math.nan},
        {"dropout": 1},
        {"dtype": "float64"},
        {"dtype": "f4,(2"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_hostile_description_of_a_model_is_refused(changes, good, tmp_path):
    description = good[1] | {"model": good[1]["model"] | changes}
    assert "expected" in refused(write(tmp_path / "m", good[0], description))


@pytest.mark.parametrize("junk", [None, [], "x", 1, {}, {"vocab_size": 6}], ids=str)
def test_a_description_that_is_no_model_is_refused(junk, good, tmp_path):
    refused(write(tmp_path / "m", good[0], good[1] | {"model": junk}))
    refused(write(tmp_path / "m", good[0], {"kind": FORMAT}))


def test_a_file_without_one_of_the_arrays_is_refused(good, tmp_path):
    names = [name for name in good[0] if name.startswith("model.")]
    for name in names:
        fewer = {key: value for key, value in good[0].items() if key != name}
        assert name.removeprefix("model.") in refused(write(tmp_path / "m", fewer, good[1]))
        empty = good[0] | {name: np.zeros((0, *good[0][name].shape[1:]), np.float32)}
        refused(write(tmp_path / "m", empty, good[1]))
    refused(write(tmp_path / "m", {}, good[1]))


def test_a_truncated_file_is_refused(good, tmp_path):
    path = write(tmp_path / "m", *good)
    content = path.read_bytes()
    for size in [*range(64), *range(64, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:size])
        refused(path)


def test_a_damaged_file_is_a_model_or_refused(good, tmp_path, rng):
    path = write(tmp_path / "m", *good)
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    loaded, complaints = 0, []
    for place in [*rng.integers(header, size=200), *rng.integers(len(content), size=50)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            model, _, _ = load_model(path)
        except ValueError as error:
            complaints.append(str(error))
        else:
            loaded += 1
            assert model.config() == LanguageModel(**model.config()).config()
    assert loaded
    assert complaints
    assert all(str(path) in complaint for complaint in complaints)


def test_saving_over_a_file_that_cannot_be_written_leaves_it_whole(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    path = tmp_path / "m"
    save_model(path, new_model(1))
    before = path.read_bytes()
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="cannot save the checkpoint: full"):
        save_model(path, new_model(2))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def restore(tensors, run):
    sizes = {"num_layers": 2, "embedding_size": 3, "cell": "gru"}
    settings = new_settings(schedule="plateau", val_every=3)
    Trainer(new_model(1, **sizes), NOISE, settings).restore(tensors, run)


REFUSED = {
    "step": [None, "7", -1, 7.5, [], {}, math.nan],
    "seconds": [None, "x", -1, math.nan, math.inf, [], 10**400],
    "losses": [None, 5, ["x"], [None], [[1.0]], [10**400], {"a": 1}],
    "loss": [None, "x", [], 10**400],
    "train_loss": [None, "x", [], 10**400],
    "val_loss": [None, "x", {}, 10**400],
    "best_val_loss": [None, "x", {}, 10**400],
    "schedule": [None, [], "x", {}, 5, {"scale": 1.0}],
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_hostile_run_is_refused(key, good):
    tensors, description = good
    restore(tensors, description["run"])
    for junk in REFUSED[key]:
        with pytest.raises(ValueError):
            restore(tensors, description["run"] | {key: junk})
    with pytest.raises(ValueError, match=key):
        restore(tensors, {k: v for k, v in description["run"].items() if k != key})


@pytest.mark.parametrize("key", ["factor", "patience", "best", "waited", "scale"])
def test_a_hostile_schedule_is_refused(key, good):
    tensors, description = good
    schedule = description["run"]["schedule"]
    for junk in (None, "x", [], {}, 10**400 if key not in ("patience", "waited") else math.inf):
        run = description["run"] | {"schedule": schedule | {key: junk}}
        with pytest.raises(ValueError):
            restore(tensors, run)
    run = description["run"] | {"schedule": {k: v for k, v in schedule.items() if k != key}}
    with pytest.raises(ValueError, match=key):
        restore(tensors, run)


@pytest.mark.parametrize("run", [None, [], "x", 5, {}])
def test_a_run_that_is_no_description_is_refused(run, good):
    with pytest.raises(ValueError, match=r"^checkpoint: expected a training run"):
        restore(good[0], run)


def test_a_run_with_an_array_missing_or_of_another_shape_is_refused(good):
    tensors, description = good
    names = {name.partition(".")[0] for name in tensors}
    assert names == {"model", "params", "optimizer", "state"}
    for name, value in tensors.items():
        fewer = {key: value for key, value in tensors.items() if key != name}
        for wrong in (fewer, tensors | {name: value[..., :-1]}, tensors | {f"{name}0": value}):
            with pytest.raises(ValueError, match="expected"):
                restore(wrong, description["run"])


def test_a_run_of_another_model_or_optimiser_is_refused(good):
    tensors, description = good
    for sizes, options in (
        ({"hidden_size": 4}, {}),
        ({"cell": "lstm"}, {}),
        ({}, {"batch": 2}),
        ({}, {"optimizer": "sgd"}),
    ):
        sizes = {"num_layers": 2, "embedding_size": 3, "cell": "gru"} | sizes
        settings = new_settings(**({"schedule": "plateau", "val_every": 3} | options))
        trainer = Trainer(new_model(**sizes), NOISE, settings)
        with pytest.raises(ValueError, match="expected"):
            trainer.restore(tensors, description["run"])
