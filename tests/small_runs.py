"""What the tests of training share: a text, small models and settings, and who watches a run."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import pytest
from helpers import same_results

from fastrnn.models import LanguageModel
from fastrnn.optim import OPTIMIZERS, SCHEDULES
from fastrnn.train import (
    Callback,
    Settings,
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
