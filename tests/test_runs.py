"""Runs that stop and go on have the bits of unbroken ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import same_results, threads
from small_runs import (
    NOISE,
    WINDOWS,
    Record,
    Tell,
    check_same_run,
    each_optimizer,
    each_schedule,
    new_model,
    new_settings,
    snapshot,
    stop_after,
    tell_save,
)

from fastrnn import checkpoint
from fastrnn.train import (
    FORMAT,
    Trainer,
    load_model,
    settings_from,
)


def test_a_file_without_the_mean_is_no_run_that_has_one():
    trainer = Trainer(new_model(), NOISE, new_settings(average=0.9, steps=3))
    trainer.fit()
    tensors, run = snapshot(trainer)
    del tensors["average.head.bias"]
    with pytest.raises(ValueError, match=r"checkpoint average: .*missing \['head.bias'\]"):
        Trainer(new_model(), NOISE, new_settings(average=0.9)).restore(tensors, run)


def broken_run(stops, settings, sizes, tokens=NOISE):
    """A run that was stopped after these steps, each time with all objects made anew."""
    saved, record = None, Record()
    for part, steps in enumerate([*np.diff([0, *stops]), None]):
        stop = stop_after(steps) if steps else lambda: False
        model = new_model(seed=part, **sizes)
        trainer = Trainer(model, tokens, settings, callbacks=[record], stop=stop)
        if saved is not None:
            trainer.restore(*saved)
            settings = settings_from(json.loads(json.dumps(saved[1]["settings"])))
        trainer.fit()
        saved = snapshot(trainer)
        if steps:
            assert trainer.step == stops[part]
    return saved, record


@each_optimizer
@each_schedule
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(optimizer, schedule):
    sizes = {"num_layers": 2, "dropout": 0.2}
    settings = new_settings(optimizer=optimizer, schedule=schedule, val_every=2, lr=0.5, seed=7)
    whole, told = broken_run([], settings, sizes)
    if schedule == "plateau":
        assert whole[1]["schedule"]["scale"] < 1, "the rate never fell: this tests nothing"
    saved, record = broken_run([7], settings, sizes)
    check_same_run(saved, whole)
    assert record.losses == told.losses
    assert record.looks == told.looks


@pytest.mark.parametrize("average", [0, 0.7])
@pytest.mark.parametrize("stop", range(1, 14))
def test_a_run_may_be_stopped_after_any_step(stop, average):
    settings = new_settings(schedule="plateau", val_every=3, lr=0.5, average=average)
    sizes = {"cell": "gru", "dropout": 0.2, "embedding_size": 3}
    whole, told = broken_run([], settings, sizes)
    assert whole[1]["schedule"]["scale"] < 1, "the rate never fell: this tests nothing"
    assert sorted(told.looks) == [3, 6, 9, 12, 13]
    saved, record = broken_run([stop], settings, sizes)
    check_same_run(saved, whole)
    assert record.losses == told.losses
    assert record.looks == told.looks


def test_a_run_may_be_stopped_after_every_step():
    settings = new_settings(optimizer="rmsprop")
    whole, told = broken_run([], settings, {})
    saved, record = broken_run(range(1, 13), settings, {})
    check_same_run(saved, whole)
    assert record.losses == told.losses


@pytest.mark.parametrize("average", [0, 0.9])
@pytest.mark.parametrize("val_fraction", [0.1, 0.0])
def test_a_finished_run_may_go_on_and_has_the_bits_of_a_longer_one(val_fraction, average):
    options = {"schedule": "plateau", "lr": 0.1, "val_fraction": val_fraction, "val_every": 3}
    options["average"] = average
    whole, told = broken_run([], new_settings(steps=17, **options), {})
    record = Record()
    trainer = Trainer(new_model(), NOISE, new_settings(steps=8, **options), callbacks=[record])
    trainer.fit()
    short = snapshot(trainer)
    trainer = Trainer(new_model(1), NOISE, new_settings(steps=17, **options), callbacks=[record])
    trainer.restore(*short)
    trainer.fit()
    saved = snapshot(trainer)
    if val_fraction:
        # The shorter run also looked at its end; the longer one must not know.
        assert set(record.looks) - set(told.looks) == {8}
    check_same_run(saved, whole)
    assert record.losses == told.losses


@pytest.mark.parametrize("stop", [3, WINDOWS, 7])
def test_a_run_goes_on_from_a_file(stop, tmp_path):
    path = tmp_path / "model.safetensors"
    settings = new_settings(schedule="plateau", lr=0.1, val_every=4, average=0.8)

    def save(trainer):
        tensors, run = trainer.checkpoint()
        about = {"kind": FORMAT, "model": trainer.model.config(), "run": run}
        checkpoint.save(path, tensors, about)

    def run(trainer):
        trainer.fit()
        return checkpoint.load(path)

    sizes = {"cell": "lstm", "dropout": 0.3, "num_layers": 2}
    tensors, whole = run(Trainer(new_model(**sizes), NOISE, settings, save=save))
    run(Trainer(new_model(**sizes), NOISE, settings, save=save, stop=stop_after(stop)))
    model, kept, description = load_model(path)
    trainer = Trainer(model, NOISE, settings_from(description["run"]["settings"]), save=save)
    trainer.restore(kept, description["run"])
    assert trainer.step == stop
    resumed, about = run(trainer)
    check_same_run((resumed, about["run"]), (tensors, whole["run"]))
    assert about["model"] == whole["model"]


RICH = {
    "lstm_projected": {"cell": "lstm", "proj_size": 3, "recurrent_dropout": 0.3},
    "lstm_norm": {"cell": "lstm", "layer_norm": True},
    "gru_before": {"cell": "gru", "reset_after": False, "zoneout": 0.3, "learned_state": True},
}


@pytest.mark.parametrize("sizes", RICH.values(), ids=RICH)
def test_a_run_of_a_rich_model_goes_on_from_a_file(sizes, tmp_path):
    # Step 6 begins the text again, with the state that is learned.
    settings, path = new_settings(steps=7, val_every=2, average=0.8), tmp_path / "m"

    def save(trainer):
        tensors, run = trainer.checkpoint()
        about = {"kind": FORMAT, "model": trainer.model.config(), "run": run}
        checkpoint.save(path, tensors, about)

    def new():
        return new_model(**sizes, num_layers=2, embedding_size=4)

    Trainer(new(), NOISE, settings, save=save).fit()
    tensors, about = checkpoint.load(path)
    for key, value in new().params.items():
        assert (tensors[f"params.{key}"] != value).any(), f"{key} was not trained"
    Trainer(new(), NOISE, settings, save=save, stop=stop_after(3)).fit()
    model, kept, description = load_model(path)
    trainer = Trainer(model, NOISE, settings_from(description["run"]["settings"]))
    trainer.restore(kept, description["run"])
    assert trainer.step == 3
    trainer.fit()
    check_same_run(snapshot(trainer), (tensors, about["run"]))
    assert description["model"] == about["model"]


def test_restoring_copies_and_a_checkpoint_is_all_it_needs():
    trainer = Trainer(new_model(), NOISE, new_settings(steps=8))
    trainer.fit()
    saved = snapshot(trainer)
    other = Trainer(new_model(1), NOISE, new_settings(steps=8))
    other.restore(*saved)
    check_same_run(other.checkpoint(), saved)
    assert (other.step, other.tokens, other.seconds) == (8, 96, trainer.seconds)
    for tensors in (saved[0], trainer.checkpoint()[0]):
        for key, value in other.checkpoint()[0].items():
            assert not np.shares_memory(value, tensors[key]), key


@pytest.mark.parametrize("val_every", [2, 20])
def test_a_stopped_run_leaves_a_model_that_has_learnt(val_every):
    record = Record()
    model = new_model()
    settings = new_settings(val_every=val_every, steps=30)
    trainer = Trainer(model, NOISE, settings, callbacks=[record], stop=stop_after(7))
    trainer.fit()
    left = {k.removeprefix("model."): v for k, v in trainer.checkpoint()[0].items()}
    if val_every == 2:
        assert sorted(record.looks) == [2, 4, 6]
        same_results({key: left[key] for key in model.params}, trainer.best_params)
    else:
        # Nothing was validated yet: the latest weights are better than the initial ones.
        assert record.looks == {}
        same_results({key: left[key] for key in model.params}, model.params)


def test_a_finished_run_saves_and_does_nothing_else():
    trainer = Trainer(new_model(), NOISE, new_settings())
    trainer.fit()
    saved = snapshot(trainer)
    events = []
    again = Trainer(
        new_model(1), NOISE, new_settings(), callbacks=[Tell(events)], save=tell_save(events)
    )
    again.restore(*saved)
    again.fit()
    assert events == ["start 13", "save 13", "end 13"]
    check_same_run(again.checkpoint(), saved)


@pytest.mark.parametrize("count", [2, 3])
@each_optimizer
def test_any_number_of_threads_gives_the_same_bits(optimizer, count):
    saved = []
    for n in (1, count):
        with threads(n):
            settings = new_settings(optimizer=optimizer, steps=6)
            model = new_model(hidden_size=20, num_layers=2, dropout=0.3, embedding_size=7)
            trainer = Trainer(model, NOISE, settings)
            trainer.fit()
            saved.append(snapshot(trainer))
    check_same_run(*saved)
