"""Settings of a run: what they may be, also in files of others."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from small_runs import (
    new_settings,
)

from fastrnn.train import (
    Settings,
    settings_from,
)


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
