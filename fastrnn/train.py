"""Training a language model by truncated backpropagation through time.

The text is cut into `batch` streams that are read side by side in windows of `tbptt_steps`; the
state is carried from window to window, gradients are not. Everything that decides the next step is
in the trainer's checkpoint, so a run that was stopped and resumed has the bits of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from fastrnn import checkpoint
from fastrnn.checks import as_choice, as_number, as_size, as_tokens, load_params
from fastrnn.clip import clip_grad_norm_
from fastrnn.models import LanguageModel, model_from_config
from fastrnn.optim import OPTIMIZERS, SCHEDULES, blend_
from fastrnn.recurrent import State

FORMAT = "fastrnn language model"
_SAVE_SECONDS = 60
_VALIDATION = 1 << 18


class Diverged(ArithmeticError):
    """The loss or a gradient is no longer finite."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    batch          streams that are read side by side
    tbptt_steps    tokens in a window, through which gradients flow
    lr             learning rate, scaled by `schedule`: constant, cosine or plateau
    clip_norm      largest norm of all gradients together; 0: no clipping
    optimizer      sgd, rmsprop, adagrad, adam or adamw, with the defaults of `fastrnn.optim`
    steps, epochs, minutes   when to stop: whichever is given and comes first; minutes count from
                   the end of the first step, which compiles
    average        up to 1: validated and kept is a running mean of the weights, of which each step
                   makes up 1 - average, the first steps more (Polyak and Juditsky 1992);
                   0: the latest weights
    val_fraction   share of the text, its end, that is kept for validation
    val_every      steps between validations; 0: once an epoch, at least every 1000 steps
    seed           of all that is drawn in training
    """

    batch: int = 32
    tbptt_steps: int = 64
    lr: float = 2e-3
    clip_norm: float = 5.0
    optimizer: str = "adam"
    schedule: str = "constant"
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    average: float = 0.0
    val_fraction: float = 0.05
    val_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        def check(name: str, kind: Callable, *limits: Any, **options: Any) -> None:
            # Numbers of NumPy become Python's, which a checkpoint can hold.
            object.__setattr__(self, name, kind(name, getattr(self, name), *limits, **options))

        check("batch", as_size)
        check("tbptt_steps", as_size)
        check("lr", as_number, 0, math.inf, open_low=True)
        check("clip_norm", as_number, 0, math.inf)
        check("optimizer", as_choice, tuple(OPTIMIZERS))
        check("schedule", as_choice, tuple(SCHEDULES))
        check("average", as_number, 0, 1)
        check("val_fraction", as_number, 0, 1)
        check("val_every", as_size, 0)
        check("seed", as_size, 0)
        if self.steps is not None:
            check("steps", as_size)
        for name in ("epochs", "minutes"):
            if getattr(self, name) is not None:
                check(name, as_number, 0, math.inf, open_low=True)
        if self.steps is None and self.epochs is None and self.minutes is None:
            raise ValueError("settings: expected steps, epochs or minutes, got none of them")
        if self.schedule == "cosine" and self.steps is None and self.epochs is None:
            raise ValueError("schedule: cosine expects steps or epochs, got only minutes")


class Callback:
    """Hears of a training run; every method may be left out."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step."""

    def on_step(self, trainer: Trainer) -> None:
        """After a step: see `trainer.step`, `trainer.loss`, `trainer.grad_norm`."""

    def on_validation(self, trainer: Trainer) -> None:
        """After a validation: see `trainer.val_loss` and `trainer.best_val_loss`."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, also when the run was stopped or has diverged."""


class Streams:
    """Windows of a text for truncated backpropagation.

    tokens (N,) integers; window k is (x, targets), each (tbptt_steps, batch), C-contiguous int32.
    """

    def __init__(self, tokens: np.ndarray, batch: int, tbptt_steps: int, name: str) -> None:
        length = (len(tokens) - 1) // batch
        self.windows = length // tbptt_steps
        if self.windows < 1:
            raise ValueError(
                f"{name}: expected at least batch * seq_len + 1 = "
                f"{batch * tbptt_steps + 1} tokens, got {len(tokens)}; "
                "choose a smaller batch or seq_len"
            )
        self.batch, self.tbptt_steps = batch, tbptt_steps
        self._x = tokens[: length * batch].reshape(batch, length)
        self._targets = tokens[1 : length * batch + 1].reshape(batch, length)

    def __getitem__(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        piece = slice(k * self.tbptt_steps, (k + 1) * self.tbptt_steps)
        return self._window(self._x[:, piece]), self._window(self._targets[:, piece])

    @staticmethod
    def _window(part: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(part.T, dtype=np.int32)


class Trainer:
    """One training run.

    model      is trained in place; `averaged` is the model of the mean of its weights, or itself
    tokens     (N,) integers, the whole text; its end is kept for validation
    callbacks  hear of every step and validation
    save       is called with the trainer at every validation and at the end
    stop       is asked after every step whether to end the run
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: Any,
        settings: Settings,
        *,
        callbacks: Iterable[Callback] = (),
        save: Callable[[Trainer], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model, self.settings = model, settings
        self.callbacks, self._save, self._stop = list(callbacks), save, stop
        ids = np.asarray(tokens)
        as_tokens("tokens", ids, model.vocab_size, (None,), "(N)")
        held_back = int(len(ids) * settings.val_fraction)
        batch, window = settings.batch, settings.tbptt_steps
        self.streams = Streams(ids[: len(ids) - held_back], batch, window, "corpus")
        self._held_back = ids[len(ids) - held_back :]
        if settings.val_fraction and held_back < 2:
            raise ValueError(
                f"val_fraction: expected at least 2 tokens to validate on, got {held_back} of "
                f"{len(ids)}; choose a larger share, or 0 for none"
            )
        self.optimizer = OPTIMIZERS[settings.optimizer](model.params, settings.lr)
        self.schedule = SCHEDULES[settings.schedule]()
        self.step = 0
        self.seconds = 0.0
        self.loss = self.train_loss = self.val_loss = self.best_val_loss = math.nan
        self.grad_norm = math.nan
        self.averaged = model
        if settings.average:
            self.averaged = model.copy()
        self.best_params = self.averaged.state_dict()
        self.state: State = model.initial_state(batch)
        self._grads = {key: np.zeros_like(value) for key, value in model.params.items()}
        self._losses: list[float] = []
        self._saved: float | None = None
        self._last_is_best = False

    @property
    def total(self) -> int | None:
        """Steps of the whole run, where they are known."""
        limits = []
        if self.settings.steps is not None:
            limits.append(self.settings.steps)
        if self.settings.epochs is not None:
            limits.append(max(1, round(self.settings.epochs * self.streams.windows)))
        return min(limits, default=None)

    @property
    def kept_params(self) -> Mapping[str, np.ndarray]:
        """The best weights: of the looks that are due, or at the end of the run."""
        # Before the first look, and without validation, the latest are the best that there is.
        latest = self._last_is_best or math.isnan(self.best_val_loss)
        return self.averaged.params if latest else self.best_params

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.step * self.settings.batch * self.settings.tbptt_steps

    def fit(self) -> None:
        """Train until a limit is reached, `stop` says so, or the loss is not finite (Diverged)."""
        every = self.settings.val_every or min(1000, self.streams.windows)
        self._tell("on_start")
        began = time.perf_counter()
        before = self.seconds
        compiling = 0.0
        try:
            if self.finished:
                self._write()
            while not self.finished:
                self._train_step()
                if not compiling:
                    compiling = time.perf_counter() - began
                    began += compiling
                self.seconds = before + time.perf_counter() - began
                self._tell("on_step")
                stopping = self._stop()
                due = self.step % every == 0
                # A run that is stopped looks where an unbroken one does, and nowhere else.
                if due or self.finished:
                    self._look(due)
                    self.seconds = before + time.perf_counter() - began
                elif stopping or time.perf_counter() - (self._saved or began) > _SAVE_SECONDS:
                    self._check_weights()
                    self._write()
                if stopping:
                    return
        finally:
            self._tell("on_end")

    @property
    def finished(self) -> bool:
        """Whether a limit is reached."""
        minutes = self.settings.minutes
        return (self.total is not None and self.step >= self.total) or (
            minutes is not None and self.step > 0 and self.seconds >= 60 * minutes
        )

    def _train_step(self) -> None:
        settings = self.settings
        k = self.step % self.streams.windows
        # None and not initial_state: gradients reach one that is learned.
        state = None if k == 0 else self.state
        x, targets = self.streams[k]
        for g in self._grads.values():
            g.fill(0)
        seed = _mask_seed(settings.seed, self.step)
        loss, grads, state = self.model.loss_and_grads(
            x, targets, state, seed=seed, grads=self._grads
        )
        limit = settings.clip_norm or math.inf
        norm = clip_grad_norm_(grads, limit)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._diverged(
                self.step + 1,
                f"a finite loss and gradient, got loss {loss:.3g} and gradient norm {norm:.3g}",
            )
        self.optimizer.lr = self.schedule.rate(settings.lr, self.step, self.total)
        self.optimizer.step(grads)
        if settings.average:
            share = max(1 - settings.average, 9 / (10 + self.step))
            blend_(self.averaged.params, self.model.params, share)
        self.state, self.loss, self.grad_norm = state, loss, norm
        self.step += 1
        self._last_is_best = False
        self._losses.append(loss)

    def _diverged(self, step: int, what: str) -> Diverged:
        lr, limit = self.settings.lr, self.settings.clip_norm
        advice = f"try a smaller lr (now {lr:g}) or "
        advice += f"clip_norm (now {limit:g})" if limit else "clip_norm 5 (now none)"
        return Diverged(f"step {step}: expected {what}; {advice}")

    def _check_weights(self) -> None:
        """Raise before weights that are no numbers take the place of good ones in a file."""
        for key, value in self.model.params.items():
            if not np.isfinite(value).all():
                raise self._diverged(self.step, f"finite weights, got NaN or infinity in {key}")

    def _look(self, due: bool) -> None:
        """Validate, keep the best weights, save.

        Only a look that is `due` shapes the steps after it: the one at the end of a run may lie
        where a longer run has none.
        """
        self._check_weights()
        if self._losses:
            self.train_loss = float(np.mean(self._losses))
        if len(self._held_back):
            val_loss = self.validate()
            if not math.isfinite(val_loss):
                raise self._diverged(self.step, f"a finite validation loss, got {val_loss:.3g}")
            self.val_loss = val_loss
        if due:
            self._losses = []
            if len(self._held_back):
                self.schedule.observe(self.val_loss)
        better = not len(self._held_back) or not self.val_loss >= self.best_val_loss
        self._last_is_best = better and not due
        if better and due:
            self.best_val_loss = self.val_loss
            self.best_params = self.averaged.state_dict()
        self._tell("on_validation")
        self._write()

    def _write(self) -> None:
        if self._save is not None:
            self._save(self)
        self._saved = time.perf_counter()

    def validate(self) -> float:
        """Mean loss in nats over the text that was held back, read as up to 32 streams.

        Of a long text the first quarter of a million tokens: a look must stay cheap.
        """
        ids = self._held_back[:_VALIDATION]
        batch = max(1, min(32, (len(ids) - 1) // self.settings.tbptt_steps))
        length = (len(ids) - 1) // batch
        x = ids[: batch * length].reshape(batch, length).T
        targets = ids[1 : batch * length + 1].reshape(batch, length).T
        losses, _ = self.averaged.token_losses(x, targets)
        return float(losses.mean())

    def _tell(self, event: str) -> None:
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                method(self)

    def checkpoint(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and a description: all that `restore` needs, the best weights under "model."."""
        state = self.state if isinstance(self.state, tuple) else (self.state,)
        tensors = {f"model.{key}": value for key, value in self.kept_params.items()}
        if self._last_is_best and not math.isnan(self.best_val_loss):
            tensors |= {f"best.{key}": value for key, value in self.best_params.items()}
        tensors |= {f"params.{key}": value for key, value in self.model.params.items()}
        if self.settings.average:
            tensors |= {f"average.{key}": value for key, value in self.averaged.params.items()}
        tensors |= {f"optimizer.{key}": value for key, value in self.optimizer.state.items()}
        tensors |= {f"state.{i}": np.ascontiguousarray(value) for i, value in enumerate(state)}
        numbers = ("loss", "train_loss", "val_loss", "best_val_loss")
        return tensors, {
            "settings": asdict(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self._losses,
            "schedule": vars(self.schedule),
            **{name: getattr(self, name) for name in numbers},
        }

    def restore(self, tensors: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of a run with the same model and text."""
        load_params(self.model.params, _under(tensors, "params."), "checkpoint params")
        averaged = self.averaged.params if self.settings.average else {}
        load_params(averaged, _under(tensors, "average."), "checkpoint average")
        best = _under(tensors, "best.")
        self._last_is_best = bool(best)
        best = best or _under(tensors, "model.")
        load_params(self.best_params, best, "checkpoint model")
        self._saved = time.perf_counter()
        try:
            step = as_size("step", description["step"], 0)
            self.optimizer.load_state(_under(tensors, "optimizer."), step)
            state = self.model.initial_state(self.settings.batch)
            parts = state if isinstance(state, tuple) else (state,)
            load_params(
                {str(i): v for i, v in enumerate(parts)}, _under(tensors, "state."), "state"
            )
            self.state = state
            self.step = step
            self.seconds = as_number("seconds", description["seconds"], 0, math.inf)
            self._losses = [float(x) for x in description["losses"]]
            for name in ("loss", "train_loss", "val_loss", "best_val_loss"):
                setattr(self, name, float(description[name]))
            for key, value in vars(self.schedule).items():
                setattr(self.schedule, key, type(value)(description["schedule"][key]))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"checkpoint: expected a training run, got {error!r}") from None


def _mask_seed(seed: int, step: int) -> int:
    """A seed of its own for the dropout of every step of every run."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


def _under(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def settings_from(description: Any) -> Settings:
    """The settings of a checkpoint, checked."""
    names = {field.name for field in fields(Settings)}
    if not isinstance(description, Mapping) or set(description) != names:
        raise ValueError(f"checkpoint settings: expected the keys {sorted(names)}")
    try:
        return Settings(**description)
    except OverflowError:
        raise ValueError("checkpoint settings: expected numbers, got one without end") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint settings: {error}") from None


def save_model(path: Any, model: LanguageModel, extra: Mapping[str, Any] | None = None) -> None:
    """Write a model to a safetensors file; `extra` goes into its description (JSON)."""
    tensors = {f"model.{key}": value for key, value in model.params.items()}
    checkpoint.save(path, tensors, {"kind": FORMAT, "model": model.config(), **(extra or {})})


def load_model(path: Any) -> tuple[LanguageModel, dict[str, np.ndarray], dict[str, Any]]:
    """The (best) model of a file, and all arrays and the description it has."""
    tensors, description = checkpoint.load(path)
    if description.get("kind") != FORMAT:
        raise ValueError(f"{path}: expected a {FORMAT}, got kind {description.get('kind')!r:.100}")
    try:
        model = model_from_config(description.get("model", {}), _under(tensors, "model."))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return model, tensors, description
