"""Training against a loop of reference functions: windows, callbacks, limits, validation."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import as_state, same, same_results
from hypothesis import given
from hypothesis import strategies as st
from small_runs import (
    NOISE,
    WINDOWS,
    Poison,
    Record,
    Tell,
    V,
    check_same_run,
    each_optimizer,
    new_model,
    new_settings,
    snapshot,
    stop_after,
    tell_save,
)
from test_models import reference_loss_and_grads

import fastrnn.train
from fastrnn.models import CELL_NAMES, LanguageModel
from fastrnn.reference import optim as reference_optim
from fastrnn.train import (
    Callback,
    Diverged,
    Streams,
    Trainer,
)


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


def test_a_learning_rate_reaches_the_optimiser_by_its_schedule():
    rates = []
    watch = SimpleNamespace(on_step=lambda trainer: rates.append(trainer.optimizer.lr))
    settings = new_settings(steps=4, schedule="cosine", lr=1.0)
    Trainer(new_model(), NOISE, settings, callbacks=[watch]).fit()
    assert rates == pytest.approx([(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])
