"""The truth: every model of fastrnn in plain NumPy, one line per equation.

The rules of this folder
------------------------
* NumPy only. Nothing here imports the rest of fastrnn, so a fault in a kernel cannot hide here.
* Written to be read. A line per equation, the names of docs/notation.md, PyTorch's semantics,
  parameter keys, shapes and gate orders. Speed does not count, and arguments are not checked.
* Pure: no argument is written to. What backward needs stands in ``saved``, which refers to ``x``.
* Results have the floating dtype of the parameters.
* Every gradient is proved against finite differences in float64 and against PyTorch, and the
  kernels are proved against this folder.

A cell module (rnn, gru, gru_before, gru_simple, lstm) is one layer in one direction and offers

    GATES, STATES                                    names, in the order of rows and of ``state``
    forward(params, x, state, **options)             -> (output, state, saved)
    backward(params, saved, d_output, d_state)       -> (d_x, d_state, grads)

with  params   weight_ih (G*H, I), weight_hh (G*H, P) and, unless the layer has no biases,
               bias_ih (G*H,), bias_hh (G*H,); then those of variants, in this order: weight_ch and
               weight_hr (lstm), norm_ih and norm_hh (gru, lstm), norm_c (lstm). They are switched
               on by their presence; ``grads`` has the same keys
      x        (T, B, I), or integer tokens (T, B) that stand for one-hot rows of width I
      state    (h,) or (h, c), h (B, P) and c (B, H): the initial state in, the final state out
      output   (T, B, P)
      d_state  gradients of the final state in, of the initial state out
      d_x      (T, B, I), or None for tokens

P, the width of h, is H but in an LSTM with a projection. Every cell has, beside its own options,

      mask     (B, P), None: ones. Wherever h enters a product with weight_hh it is mask ⊙ h; where
               it is added or mixed (z ⊙ h, zone ⊙ h) it is h itself. The mask is the same at all
               steps, its scaling is in it: variational dropout, Y. Gal and Z. Ghahramani, "A
               theoretically grounded application of dropout in recurrent neural networks",
               arXiv:1512.05287 (2016)
      zone     (T, B, P) of 0 and 1, or a number p in [0, 1], None: zeros. With h~ for the h' of the
               equations, h' = zone[t] ⊙ h + (1 - zone[t]) ⊙ h~: 1 keeps the old h, p is what is
               expected of masks drawn with p. c is untouched: zoneout, D. Krueger et al., "Zoneout:
               regularizing RNNs by randomly preserving hidden activations", arXiv:1606.01305 (2017)

masks.py has the masks that kernels draw, norm.py is layer normalisation.
"""

from __future__ import annotations

from types import ModuleType

from fastrnn.reference import gru, gru_before, gru_simple, lstm, rnn

__all__ = ["CELLS"]

CELLS: dict[str, ModuleType] = {
    "rnn": rnn,
    "gru": gru,
    "gru_before": gru_before,
    "gru_simple": gru_simple,
    "lstm": lstm,
}
