from __future__ import annotations

import copy
import errno
import itertools
import json
import math
import tracemalloc
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import as_parts, as_state, same, same_results, threads
from hypothesis import given
from hypothesis import strategies as st
from test_models import reference_loss_and_grads

import fastrnn.train
from fastrnn import checkpoint
from fastrnn.models import CELL_NAMES, LanguageModel
from fastrnn.optim import OPTIMIZERS, SCHEDULES
from fastrnn.reference import optim as reference_optim
from fastrnn.train import (
    FORMAT,
    Callback,
    Diverged,
    Settings,
    Streams,
    Trainer,
    load_model,
    save_model,
    settings_from,
)

V = 6
# 72 to train on, 8 to validate: five windows of 3 x 4 tokens.
NOISE = np.random.default_rng(0).integers(V, size=80)
WINDOWS = 5

each_optimizer = pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
each_schedule = pytest.mark.parametrize("schedule", sorted(SCHEDULES))


def new_model(seed=0, **options):
    options = {"vocab_size": V, "hidden_size": 5, "num_layers": 1, "dropout": 0.0} | options
    return LanguageModel(**options, seed=seed)


def new_settings(**options):
    defaults = {"batch": 3, "tbptt_steps": 4, "lr": 0.05, "val_fraction": 0.1}
    limits = {} if {"epochs", "minutes"} & set(options) else {"steps": 13}
    return Settings(**(defaults | limits | options))


class Record(Callback):
    """The losses of the steps, and where validations were and what they found."""

    def __init__(self):
        self.losses, self.looks, self.norms = [], {}, []

    def on_step(self, trainer):
        self.losses.append(trainer.loss)
        self.norms.append(trainer.grad_norm)

    def on_validation(self, trainer):
        self.looks[trainer.step] = trainer.val_loss


class Poison(Callback):
    """Fills an array with `value` after a step."""

    def __init__(self, step, value, key="head.weight"):
        self.step, self.value, self.key = step, value, key

    def on_step(self, trainer):
        if trainer.step == self.step:
            trainer.model.params[self.key][...] = self.value


def stop_after(steps):
    calls = itertools.count(1)
    return lambda: next(calls) == steps


def snapshot(trainer):
    return copy.deepcopy(trainer.checkpoint())


def check_same_run(got, want):
    """Two checkpoints are equal but for the time that passed."""
    same_results(got[0], want[0])
    texts = [json.dumps(run[1] | {"seconds": 0}, sort_keys=True) for run in (got, want)]
    assert texts[0] == texts[1]


# Windows


def test_windows_are_pieces_of_contiguous_streams_and_targets_come_next():
    streams = Streams(np.arange(100, 123), 2, 3, "corpus")
    assert streams.windows == 3
    x, targets = streams[1]
    assert x.T.tolist() == [[103, 104, 105], [114, 115, 116]]
    assert targets.T.tolist() == [[104, 105, 106], [115, 116, 117]]


@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 60),
    st.sampled_from([np.uint8, np.int32, np.int64]),
)
def test_streams_skip_nothing_and_hold_as_much_as_fits(batch, steps, more, dtype):
    count = batch * steps + 1 + more
    streams = Streams(np.arange(count, dtype=dtype), batch, steps, "corpus")
    windows = [streams[k] for k in range(streams.windows)]
    for x, targets in windows:
        for part in (x, targets):
            assert part.shape == (steps, batch)
            assert part.dtype == np.int32
            assert part.flags.c_contiguous
        same(targets, x + 1)
    whole = np.concatenate([x for x, _ in windows])
    same(whole, whole[:1] + np.arange(len(whole), dtype=np.int32)[:, None])
    starts = np.diff(whole[0])
    assert whole[0, 0] == 0
    # What is left of a stream is less than a window, and streams do not overlap.
    assert ((starts >= len(whole)) & (starts < len(whole) + steps)).all()
    assert count - batch * len(whole) <= batch * steps


@pytest.mark.parametrize("count", [0, 1, 5, 6])
def test_a_text_shorter_than_a_window_is_refused(count):
    with pytest.raises(ValueError) as caught:
        Streams(np.arange(count), 2, 3, "corpus")
    assert str(caught.value) == (
        f"corpus: expected at least batch * seq_len + 1 = 7 tokens, got {count}; "
        "choose a smaller batch or seq_len"
    )
    assert Streams(np.arange(7), 2, 3, "corpus").windows == 1


# Learning


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_a_text_that_repeats_itself_is_learnt_by_heart(cell):
    model = new_model(cell=cell, hidden_size=16)
    text = np.tile([0, 1, 0, 2, 3, 3, 4], 60)
    trainer = Trainer(model, text, new_settings(steps=250, lr=0.02, tbptt_steps=12))
    trainer.fit()
    assert trainer.train_loss < 1.0
    assert trainer.loss < 0.02
    # The first tokens of a stream have no past, so a little is left.
    assert trainer.val_loss < 0.3
    x = text[None, :70].T
    losses, _ = model.token_losses(x, text[None, 1:71].T)
    assert losses[10:].max() < 0.05


def test_a_coin_and_its_copy_are_learnt_to_their_entropy():
    coins = np.random.default_rng(0).integers(2, size=6000)
    text = np.repeat(coins, 2)
    # A third token between pairs tells which of the two comes next.
    text = np.insert(text, np.arange(0, len(text), 2), 2)
    model = new_model(vocab_size=3, hidden_size=12)
    settings = new_settings(steps=1000, batch=8, tbptt_steps=24, lr=0.02, schedule="cosine")
    trainer = Trainer(model, text, settings)
    trainer.fit()
    assert trainer.val_loss == pytest.approx(math.log(2) / 3, abs=0.02)


# Against a loop written here


def reference_rate(settings, step):
    if settings.schedule == "cosine":
        return settings.lr * (1 + math.cos(math.pi * step / settings.steps)) / 2
    return settings.lr


def reference_run(model, tokens, settings):
    """Losses, gradient norms and parameters of a run, in float64 and one step after another."""
    model64 = LanguageModel(**(model.config() | {"dtype": "float64"}))
    model64.load_state_dict(model.state_dict())
    params, states = model64.params, {key: {} for key in model64.params}
    update = getattr(reference_optim, settings.optimizer)
    batch, steps = settings.batch, settings.tbptt_steps
    train = tokens[: len(tokens) - int(len(tokens) * settings.val_fraction)]
    length = (len(train) - 1) // batch
    losses, norms, state = [], [], None
    for step in range(settings.steps):
        k = step % (length // steps)
        at = np.arange(batch) * length + k * steps
        rows = at + np.arange(steps)[:, None]
        loss, grads, state = reference_loss_and_grads(
            model64,
            train[rows],
            train[rows + 1],
            as_state(state) if k else None,
            fastrnn.train._mask_seed(settings.seed, step),
        )
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        factor = 1.0
        if settings.clip_norm and norm > settings.clip_norm:
            factor = settings.clip_norm / (norm + 1e-6)
        rate = reference_rate(settings, step)
        for key, p in params.items():
            p[...], states[key] = update(p, factor * grads[key], states[key], rate)
        losses.append(loss)
        norms.append(norm)
    return losses, norms, params


@each_optimizer
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("lstm", {"clip_norm": 0.05}),
        ("gru", {"schedule": "cosine", "clip_norm": 0}),
        ("rnn", {"seed": 3}),
    ],
    ids=["lstm-clipped", "gru-cosine", "rnn-dropout"],
)
def test_the_first_losses_are_those_of_a_loop_of_reference_functions(optimizer, cell, options):
    sizes = {"num_layers": 2, "embedding_size": 3, "dropout": 0.4} if cell == "rnn" else {}
    model = new_model(cell=cell, dtype=np.float64, **sizes)
    settings = new_settings(optimizer=optimizer, lr=0.02, steps=10, **options)
    losses, norms, params = reference_run(model, NOISE, settings)
    if options.get("clip_norm"):
        assert min(norms) > options["clip_norm"], "nothing is clipped: this tests nothing"
    record = Record()
    Trainer(model, NOISE, settings, callbacks=[record]).fit()
    assert len(losses) > WINDOWS
    np.testing.assert_allclose(record.losses, losses, rtol=1e-9)
    np.testing.assert_allclose(record.norms, norms, rtol=1e-8)
    for key, value in params.items():
        np.testing.assert_allclose(model.params[key], value, rtol=1e-7, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_single_precision_has_the_first_ten_losses_of_the_loop(cell):
    model = new_model(cell=cell)
    settings = new_settings(steps=10, lr=2e-3)
    losses, _, _ = reference_run(model, NOISE, settings)
    record = Record()
    Trainer(model, NOISE, settings, callbacks=[record]).fit()
    assert abs(losses[0] - losses[-1]) > 1e-3
    np.testing.assert_allclose(record.losses, losses, atol=1e-6, rtol=0)


# The mean of the weights


@pytest.mark.parametrize("average", [0.3, 0.99])
def test_what_is_validated_and_kept_is_the_mean_of_the_weights(average):
    weights, means = [], []

    class Watch(Callback):
        def on_step(self, trainer):
            weights.append(trainer.model.state_dict())

        def on_validation(self, trainer):
            means.append((trainer.step, trainer.val_loss, trainer.averaged.state_dict()))

    settings = new_settings(average=average, val_every=4, lr=0.02)
    trainer = Trainer(new_model(), NOISE, settings, callbacks=[Watch()])
    mean = {key: value.astype(np.float64) for key, value in trainer.model.state_dict().items()}
    trainer.fit()
    looks = {step: (loss, found) for step, loss, found in means}
    assert sorted(looks) == [4, 8, 12, 13]
    for step, latest in enumerate(weights, 1):
        share = max(1 - average, 9 / (9 + step))
        for key, value in mean.items():
            mean[key] = (1 - share) * value + share * latest[key]
        if step in looks:
            loss, found = looks[step]
            for key, value in mean.items():
                np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-7)
            judge = new_model()
            judge.load_state_dict(found)
            other = Trainer(judge, NOISE, new_settings())
            assert loss == other.validate()
    best = min(looks, key=lambda step: looks[step][0])
    same_results(dict(trainer.kept_params), looks[best][1])
    assert any((trainer.kept_params[k] != v).any() for k, v in trainer.model.params.items())


def test_the_weights_that_are_trained_know_nothing_of_their_mean():
    found = []
    for average in (0, 0.9):
        trainer = Trainer(new_model(), NOISE, new_settings(average=average))
        trainer.fit()
        found.append(trainer.model.state_dict())
    same_results(*found)


def test_a_file_without_the_mean_is_no_run_that_has_one():
    trainer = Trainer(new_model(), NOISE, new_settings(average=0.9, steps=3))
    trainer.fit()
    tensors, run = snapshot(trainer)
    del tensors["average.head.bias"]
    with pytest.raises(ValueError, match=r"checkpoint average: .*missing \['head.bias'\]"):
        Trainer(new_model(), NOISE, new_settings(average=0.9)).restore(tensors, run)


# Stopping and resuming


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


# What a run tells, keeps and counts


class Tell(Callback):
    """Writes down what it hears."""

    def __init__(self, events, name=""):
        self.events, self.name = events, name

    def on_start(self, trainer):
        self.events.append(f"{self.name}start {trainer.step}")

    def on_step(self, trainer):
        self.events.append(f"{self.name}step {trainer.step}")

    def on_validation(self, trainer):
        self.events.append(f"{self.name}validation {trainer.step}")

    def on_end(self, trainer):
        self.events.append(f"{self.name}end {trainer.step}")


def tell_save(events):
    return lambda trainer: events.append(f"save {trainer.step}")


def test_callbacks_hear_of_everything_in_order():
    events = []
    only_end = SimpleNamespace(on_end=lambda trainer: events.append("done"))
    callbacks = [Tell(events), only_end, Tell(events, "second ")]
    settings = new_settings(steps=3, val_every=2)
    Trainer(new_model(), NOISE, settings, callbacks=callbacks, save=tell_save(events)).fit()
    assert events == [
        "start 0",
        "second start 0",
        "step 1",
        "second step 1",
        "step 2",
        "second step 2",
        "validation 2",
        "second validation 2",
        "save 2",
        "step 3",
        "second step 3",
        "validation 3",
        "second validation 3",
        "save 3",
        "end 3",
        "done",
        "second end 3",
    ]


def test_a_stopped_run_saves_and_tells_its_end():
    events = []
    stop = stop_after(2)
    settings = new_settings(val_every=4)
    trainer = Trainer(
        new_model(), NOISE, settings, callbacks=[Tell(events)], save=tell_save(events), stop=stop
    )
    trainer.fit()
    assert events == ["start 0", "step 1", "step 2", "save 2", "end 2"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("full"), ValueError("mine")])
def test_an_error_of_save_or_a_callback_comes_out_and_the_end_is_told(error):
    def fail(trainer):
        raise error

    for options in (
        {"save": fail},
        {"callbacks": [SimpleNamespace(on_step=fail)]},
        {"callbacks": [SimpleNamespace(on_validation=fail)]},
    ):
        events = []
        callbacks = [Tell(events), *options.pop("callbacks", [])]
        trainer = Trainer(new_model(), NOISE, new_settings(), callbacks=callbacks, **options)
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            trainer.fit()
        assert events[-1].startswith("end")


def test_validations_are_once_an_epoch_or_every_so_many_steps_and_at_the_end():
    for options, steps in (
        ({}, [5, 10, 13]),
        ({"val_every": 4}, [4, 8, 12, 13]),
        ({"val_every": 50}, [13]),
        ({"batch": 1, "tbptt_steps": 1, "steps": 1003}, [1000, 1003]),
    ):
        record = Record()
        text = np.tile(NOISE, 15) if "batch" in options else NOISE
        Trainer(new_model(), text, new_settings(**options), callbacks=[record]).fit()
        assert sorted(record.looks) == steps


def test_the_best_model_is_kept():
    record = Record()
    weights = {}
    keep = SimpleNamespace(
        on_validation=lambda trainer: weights.update({trainer.step: trainer.model.state_dict()})
    )
    settings = new_settings(steps=60, lr=0.1, val_every=4)
    trainer = Trainer(new_model(), NOISE, settings, callbacks=[record, keep])
    trainer.fit()
    best = min(record.looks, key=record.looks.get)
    assert 4 < best < 60, "the best is the first or the last: this tests nothing"
    assert trainer.best_val_loss == record.looks[best]
    assert trainer.val_loss == record.looks[60]
    same_results(trainer.best_params, weights[best])
    tensors, description = trainer.checkpoint()
    assert description["best_val_loss"] == record.looks[best]
    for key, value in weights[best].items():
        same(tensors[f"model.{key}"], value)
        same(tensors[f"params.{key}"], weights[60][key])


def test_without_validation_the_last_model_is_kept():
    trainer = Trainer(new_model(), NOISE, new_settings(val_fraction=0, lr=0.1))
    trainer.fit()
    assert math.isnan(trainer.val_loss)
    assert math.isnan(trainer.best_val_loss)
    same_results(trainer.kept_params, trainer.model.params)


def test_a_run_does_not_change_its_corpus_and_takes_any_integers():
    runs = []
    for kind in (np.uint8, np.int32, np.int64):
        text = NOISE.astype(kind)
        text.flags.writeable = False
        trainer = Trainer(new_model(), text, new_settings())
        trainer.fit()
        runs.append(snapshot(trainer))
    trainer = Trainer(new_model(), NOISE.tolist(), new_settings())
    trainer.fit()
    for run in (*runs[1:], trainer.checkpoint()):
        check_same_run(run, runs[0])


def test_the_train_loss_is_the_mean_since_the_validation_before():
    record = Record()
    found = {}
    keep = SimpleNamespace(on_validation=lambda t: found.update({t.step: t.train_loss}))
    Trainer(new_model(), NOISE, new_settings(steps=12), callbacks=[record, keep]).fit()
    for first, last in ((0, 5), (5, 10), (10, 12)):
        assert found[last] == pytest.approx(np.mean(record.losses[first:last]), rel=1e-12)


@pytest.mark.parametrize(
    ("limits", "total"),
    [
        ({"steps": 7}, 7),
        ({"epochs": 2}, 10),
        ({"epochs": 1.5}, 8),
        ({"epochs": 0.01}, 1),
        ({"epochs": 2, "steps": 7}, 7),
        ({"epochs": 1, "steps": 7}, 5),
        ({"minutes": 1}, None),
    ],
    ids=str,
)
def test_a_run_ends_at_the_first_limit(limits, total):
    trainer = Trainer(new_model(), NOISE, new_settings(**limits))
    assert trainer.total == total
    if total:
        trainer.fit()
        assert trainer.step == total
        assert trainer.tokens == 12 * total


def test_minutes_count_from_the_end_of_the_first_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(fastrnn.train, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    step = LanguageModel.loss_and_grads
    took = []

    def slow(model, *args, **options):
        # The first step of a process compiles.
        now[0] += 1000 if not took else 20
        took.append(1)
        return step(model, *args, **options)

    monkeypatch.setattr(LanguageModel, "loss_and_grads", slow)
    settings = new_settings(minutes=1)
    trainer = Trainer(new_model(), NOISE, settings)
    trainer.fit()
    assert (trainer.step, trainer.seconds) == (4, 60)
    saved = snapshot(trainer)
    took.clear()
    trainer = Trainer(new_model(), NOISE, new_settings(minutes=2))
    trainer.restore(*saved)
    trainer.fit()
    assert (trainer.step, trainer.seconds) == (8, 120)


# Validation


@pytest.mark.parametrize("held", [2, 8, 41, 300])
def test_validation_is_the_mean_loss_of_the_text_held_back(held):
    text = np.random.default_rng(held).integers(V, size=600)
    fraction = (held + 0.5) / 600
    model = new_model(dtype=np.float64)
    trainer = Trainer(model, text, new_settings(val_fraction=fraction))
    batch = {2: 1, 8: 1, 41: 10, 300: 32}[held]
    length = (held - 1) // batch
    rows = 600 - held + np.arange(batch) * length + np.arange(length)[:, None]
    wanted, _, _ = reference_loss_and_grads(model, text[rows], text[rows + 1])
    assert trainer.validate() == pytest.approx(wanted, rel=1e-10)
    # Nothing of it is trained on.
    limit = 600 - held
    assert trainer.streams.windows == ((limit - 1) // 3) // 4
    x, targets = trainer.streams[trainer.streams.windows - 1]
    at = ((limit - 1) // 3) * 2 + (trainer.streams.windows - 1) * 4
    assert at + 4 < limit
    same(x[:, 2], text[at : at + 4].astype(np.int32))
    same(targets[:, 2], text[at + 1 : at + 5].astype(np.int32))


def test_validation_changes_nothing():
    settings = new_settings(steps=9)
    with_looks = Trainer(
        new_model(dropout=0.3),
        NOISE,
        settings,
        callbacks=[SimpleNamespace(on_step=lambda trainer: trainer.validate())],
    )
    plain = Trainer(new_model(dropout=0.3), NOISE, settings)
    with_looks.fit()
    plain.fit()
    check_same_run(with_looks.checkpoint(), plain.checkpoint())


def test_a_share_too_small_to_validate_on_is_refused():
    message = r"^val_fraction: expected at least 2 tokens to validate on, got 1 of 80"
    with pytest.raises(ValueError, match=message):
        Trainer(new_model(), NOISE, new_settings(val_fraction=0.02))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], (TypeError, ValueError), "tokens: expected"),
        (np.zeros(0, int), ValueError, "tokens: expected shape"),
        (np.zeros((80, 1), int), ValueError, "tokens: expected shape"),
        (np.zeros(80), TypeError, "tokens: expected integer tokens, got float64"),
        (np.full(80, V), ValueError, "tokens: expected tokens in [0, 6), got 6"),
        (np.full(80, -1), ValueError, "tokens: expected tokens in [0, 6), got -1"),
        (np.zeros(12, int), ValueError, "corpus: expected at least batch * seq_len + 1 = 13"),
        (["a"] * 80, TypeError, "tokens: expected an array of numbers"),
        (None, TypeError, "tokens: expected"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_bad_text_is_named(tokens, error, message):
    with pytest.raises(error) as caught:
        Trainer(new_model(), tokens, new_settings())
    assert str(caught.value).startswith(message)


# Divergence


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@each_optimizer
def test_divergence_names_the_step_and_touches_nothing(optimizer, value):
    saves = []
    trainer = Trainer(
        new_model(),
        NOISE,
        new_settings(optimizer=optimizer),
        save=lambda trainer: saves.append(trainer.step),
    )
    kept = []
    watch = SimpleNamespace(on_step=lambda trainer: kept.append(snapshot(trainer)))
    events = []
    trainer.callbacks += [Poison(6, value), watch, Tell(events)]
    with pytest.raises(Diverged) as caught:
        trainer.fit()
    assert str(caught.value).startswith("step 7: expected a finite loss and gradient, got loss ")
    assert "try a smaller lr (now 0.05) or clip_norm (now 5)" in str(caught.value)
    assert isinstance(caught.value, ArithmeticError)
    check_same_run(trainer.checkpoint(), kept[-1])
    assert trainer.optimizer.steps == trainer.step == len(kept) == 6
    assert saves == [5]
    assert events[-2:] == ["step 6", "end 6"]


def test_a_gradient_that_is_not_finite_is_divergence_even_if_the_loss_is(monkeypatch):
    step = LanguageModel.loss_and_grads

    def spoil(model, *args, **options):
        loss, grads, state = step(model, *args, **options)
        grads["rnn.weight_hh_l0"][0, 0] = np.nan
        return loss, grads, state

    monkeypatch.setattr(LanguageModel, "loss_and_grads", spoil)
    model = new_model()
    before = model.state_dict()
    with pytest.raises(Diverged, match=r"^step 1: .* got loss \d.* and gradient norm nan"):
        Trainer(model, NOISE, new_settings()).fit()
    same_results(model.params, before)


@pytest.mark.parametrize("val_fraction", [0.1, 0.0])
@pytest.mark.parametrize("stopping", [False, True], ids=["looking", "stopping"])
def test_weights_that_are_not_finite_are_never_saved(val_fraction, stopping):
    saves = []
    step = 8 if stopping else 10
    trainer = Trainer(
        new_model(),
        NOISE,
        new_settings(val_fraction=val_fraction, val_every=5),
        callbacks=[Poison(step, np.inf)],
        save=lambda trainer: saves.append(trainer.step),
        stop=stop_after(8) if stopping else lambda: False,
    )
    with pytest.raises(Diverged, match=rf"^step {step}: expected finite weights, .*head.weight"):
        trainer.fit()
    assert saves == [5]
    assert all(np.isfinite(value).all() for value in trainer.best_params.values())


def test_a_validation_loss_that_is_not_finite_is_divergence():
    saves, record = [], Record()
    # Hidden units of 1 and weights near the largest number: the logits are infinite.
    huge = 3e38 * np.array([1, -1] * 3)[:, None]
    trainer = Trainer(
        new_model(),
        NOISE,
        new_settings(),
        callbacks=[record, Poison(10, 30, "rnn.bias_ih_l0"), Poison(10, huge)],
        save=lambda trainer: saves.append(trainer.step),
    )
    with pytest.raises(Diverged, match=r"^step 10: expected a finite validation loss, got"):
        trainer.fit()
    assert saves == [5]
    assert trainer.val_loss == trainer.best_val_loss == record.looks[5]
    assert list(record.looks) == [5]


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"batch": 1.5}, "batch: expected an integer, got 1.5"),
        ({"tbptt_steps": 0}, "tbptt_steps: expected at least 1, got 0"),
        ({"lr": 0}, "lr: expected a number in (0, inf), got 0"),
        ({"lr": -1}, "lr: expected a number in (0, inf), got -1"),
        ({"lr": math.nan}, "lr: expected a number in (0, inf), got nan"),
        ({"lr": "fast"}, "lr: expected a number, got 'fast'"),
        ({"clip_norm": -1}, "clip_norm: expected a number in [0, inf), got -1"),
        ({"clip_norm": math.inf}, "clip_norm: expected a number in [0, inf), got inf"),
        ({"average": 1}, "average: expected a number in [0, 1), got 1"),
        ({"average": "mean"}, "average: expected a number, got 'mean'"),
        ({"optimizer": "Adam"}, "optimizer: expected one of sgd, rmsprop, adagrad, adam, adamw"),
        ({"schedule": "step"}, "schedule: expected one of constant, cosine, plateau"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"epochs": 0}, "epochs: expected a number in (0, inf), got 0"),
        ({"epochs": math.inf}, "epochs: expected a number in (0, inf), got inf"),
        ({"minutes": -1}, "minutes: expected a number in (0, inf), got -1"),
        ({"minutes": math.nan}, "minutes: expected a number in (0, inf), got nan"),
        ({"val_fraction": 1}, "val_fraction: expected a number in [0, 1), got 1"),
        ({"val_fraction": -0.1}, "val_fraction: expected a number in [0, 1), got -0.1"),
        ({"val_every": -1}, "val_every: expected at least 0, got -1"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"steps": None}, "settings: expected steps, epochs or minutes, got none of them"),
        (
            {"schedule": "cosine", "minutes": 1, "steps": None},
            "schedule: cosine expects steps or epochs, got only minutes",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_setting_is_named(options, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        Settings(**({"steps": 5} | options))
    assert str(caught.value).startswith(message)


def test_settings_round_trip_and_become_plain():
    settings = Settings(
        batch=np.int64(3), lr=np.float32(0.5), steps=np.uint8(7), epochs=2, seed=np.int32(1)
    )
    plain = asdict(settings)
    assert {type(value) for value in plain.values()} <= {int, float, str, type(None)}
    assert settings_from(json.loads(json.dumps(plain))) == settings


JUNK = [None, "", "x", [], {}, [1], -1, math.nan, math.inf, 10**400, 1.5]
ALLOWED = {
    "batch": [10**400],
    "tbptt_steps": [10**400],
    "lr": [1.5],
    "clip_norm": [1.5],
    "steps": [10**400],
    "epochs": [None, 1.5],
    "minutes": [None, 1.5],
    "val_every": [10**400],
    "seed": [10**400],
}


@pytest.mark.parametrize("field", sorted(asdict(new_settings())))
def test_hostile_settings_are_refused(field):
    good = asdict(new_settings())
    for junk in JUNK:
        if junk in ALLOWED.get(field, ()):
            settings_from(good | {field: junk})
        else:
            with pytest.raises(ValueError, match=r"^checkpoint settings: "):
                settings_from(good | {field: junk})
    for keys in (set(good) - {field}, set(good) | {"more"}):
        with pytest.raises(ValueError, match=r"^checkpoint settings: expected the keys"):
            settings_from(dict.fromkeys(keys, good[field]))


@pytest.mark.parametrize("junk", [None, "", [], 5, {}])
def test_settings_must_be_a_mapping(junk):
    with pytest.raises(ValueError, match=r"^checkpoint settings: expected the keys"):
        settings_from(junk)


def test_a_learning_rate_reaches_the_optimiser_by_its_schedule():
    rates = []
    watch = SimpleNamespace(on_step=lambda trainer: rates.append(trainer.optimizer.lr))
    settings = new_settings(steps=4, schedule="cosine", lr=1.0)
    Trainer(new_model(), NOISE, settings, callbacks=[watch]).fit()
    assert rates == pytest.approx([(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])


# Files


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


# Hostile runs


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
