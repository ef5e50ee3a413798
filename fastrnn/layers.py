"""RNN, GRU and LSTM: `Recurrent` with their cells and the options of these."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastrnn.cells import CELLS, gru_norm, lstm, lstm_norm
from fastrnn.checks import as_choice, as_dtype, as_number, as_size
from fastrnn.recurrent import Recurrent


class RNN(Recurrent):
    """The plain recurrent network of Elman (1990): h' = tanh(W_ih x + b_ih + W_hh h + b_hh).

    Arguments, shapes and parameter keys are those of `torch.nn.RNN`; `nonlinearity` is "tanh" or
    "relu"; what all layers have beside is told at `Recurrent`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.nonlinearity = as_choice("nonlinearity", nonlinearity, ("tanh", "relu"))
        cell = CELLS[f"rnn_{nonlinearity}"]
        super().__init__(cell, input_size, hidden_size, num_layers, *args, **kwargs)


class GRU(Recurrent):
    """Gated recurrent unit, Cho et al. (2014, arXiv:1406.1078v1).

    Arguments, shapes, gate order r, z, n and parameter keys are those of `torch.nn.GRU`; what all
    layers have beside is told at `Recurrent`.

    reset_after  False: the reset gate acts on h before the product, W_hn (r h), as in version 3 of
                 the paper, Keras with reset_after=False and ONNX by default; another network
    reset_gate   False: none, r is 1, wherever it would act; the weights have the gates z, n
    layer_norm   W_ih x and W_hh h are normalised, each over all gates (Ba et al. 2016,
                 arXiv:1607.06450), then multiplied by gains `norm_ih`, `norm_hh` (3 H,); biases
                 are added after that
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        *args: Any,
        reset_after: bool = True,
        reset_gate: bool = True,
        layer_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        self.reset_after, self.reset_gate = bool(reset_after), bool(reset_gate)
        self.layer_norm = bool(layer_norm)
        form = "gru" if reset_after else "gru_before"
        cell = CELLS[form if reset_gate else "gru_simple"]
        if layer_norm:
            if form != "gru" or not reset_gate:
                name = "reset_gate=False" if not reset_gate else "reset_after=False"
                raise ValueError(
                    f"layer_norm: expected False beside {name}; only the GRU with its reset gate "
                    "after the product has it"
                )
            cell = gru_norm(bool(bias))
        super().__init__(cell, input_size, hidden_size, num_layers, bias, *args, **kwargs)


class LSTM(Recurrent):
    """Long short-term memory, Hochreiter and Schmidhuber (1997) with Gers' forget gate (2000).

    Arguments, shapes, gate order i, f, g, o and parameter keys are those of `torch.nn.LSTM`; what
    all layers have beside is told at `Recurrent`.

    proj_size    P: h' = W_hr (o tanh(c')) has P units, fewer than H (Sak et al. 2014): `weight_hr`
                 (P, H); 0: no projection
    peephole     gates see the cell state (Gers and Schmidhuber 2000): `weight_ch` (3, H), what it
                 is multiplied by in the gates i, f (before the step), o (after it)
    coupled      the forget gate is 1 - i (Greff et al. 2015): the weights have the gates i, g, o,
                 weight_ch i, o
    cell_clip    the cell state stays within +-cell_clip; where it would not, no gradient passes
    layer_norm   W_ih x and W_hh h are normalised, each over all gates, then multiplied by gains
                 `norm_ih`, `norm_hh` (4 H,), and c' by `norm_c` (2, H), a gain and a shift, on its
                 way to tanh (Ba et al. 2016, arXiv:1607.06450); biases are added after that; not
                 beside the four above
    forget_bias  where the bias of the forget gate begins (Jozefowicz et al. 2015 advise 1); by
                 default as `init` has it
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        peephole: bool = False,
        coupled: bool = False,
        cell_clip: float | None = None,
        layer_norm: bool = False,
        forget_bias: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.peephole, self.coupled, self.cell_clip = bool(peephole), bool(coupled), cell_clip
        if cell_clip is not None:
            dtype = np.finfo(as_dtype(kwargs.get("dtype", np.float32)))
            low, high = float(dtype.tiny), float(dtype.max)
            self.cell_clip = as_number("cell_clip", cell_clip, low, high)
            self._settings = (self.cell_clip,)
        self.forget_bias = None
        if forget_bias is not None:
            self.forget_bias = self._as_forget_bias(forget_bias, bias)
        cell = lstm(
            peephole=self.peephole,
            coupled=self.coupled,
            clip=cell_clip is not None,
            projected=as_size("proj_size", proj_size, 0) != 0,
        )
        self.layer_norm = bool(layer_norm)
        if layer_norm:
            if cell is not CELLS["lstm"]:
                raise ValueError(
                    "layer_norm: expected False beside peephole, coupled, cell_clip and proj_size, "
                    "which the normalised LSTM does not have"
                )
            cell = lstm_norm(bool(bias))
        sizes = input_size, hidden_size, num_layers
        super().__init__(
            cell, *sizes, bias, batch_first, dropout, bidirectional, proj_size, **kwargs
        )

    def _begin(self, random: np.random.Generator) -> None:
        super()._begin(random)
        start = self.forget_bias
        if start is None and self.init == "glorot" and self.bias and not self.coupled:
            start = 1.0
        if start is not None:
            # Both biases are added: one has it all.
            rows = slice(self.hidden_size, 2 * self.hidden_size)
            for key, value in self.params.items():
                if key.startswith("bias_ih"):
                    value[rows] = start
                elif key.startswith("bias_hh"):
                    value[rows] = 0

    def _as_forget_bias(self, value: Any, bias: bool) -> float:
        number = as_number("forget_bias", value, -np.inf, np.inf, open_low=True)
        without = "bias=False" if not bias else "coupled=True" if self.coupled else None
        if without:
            raise ValueError(
                f"forget_bias: expected None beside {without}, which has no such bias, got {value}"
            )
        return number
