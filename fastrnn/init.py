"""How weights begin.

pytorch   all of them U(-1/sqrt(H), 1/sqrt(H)), as in torch.nn
glorot    Keras's: weight_ih uniform as by Glorot and Bengio (2010), weight_hh with orthonormal
          columns (Saxe et al. 2014, arXiv:1312.6120), biases 0, but 1 for the forget gate of `LSTM`
identity  weight_hh the identity, weight_ih from a normal distribution of deviation 0.001, biases 0:
          for a ReLU network that remembers (Le et al. 2015, arXiv:1504.00941)

Other weights, of peepholes and the like, begin as in `pytorch`, initial states that are learned and
shifts with 0, gains with 1.
"""

from __future__ import annotations

import math

import numpy as np

INITS = ("pytorch", "glorot", "identity")


def initial(
    name: str, shape: tuple[int, ...], size: int, init: str, random: np.random.Generator
) -> np.ndarray:
    """The parameter `name` without its layer, in float64; `size` is H."""
    if name.endswith("_0"):
        return np.zeros(shape)
    if name.startswith("norm"):
        # Of the cell state's two rows the second is a shift.
        return np.stack([np.ones(size), np.zeros(size)]) if name == "norm_c" else np.ones(shape)
    bound = 1 / math.sqrt(size)
    drawn = random.uniform(-bound, bound, shape)
    if init == "pytorch":
        return drawn
    if name.startswith("bias"):
        return np.zeros(shape)
    if name == "weight_ih" and init == "identity":
        return random.normal(0, 0.001, shape)
    if name == "weight_hh" and init == "identity":
        return np.eye(size)
    if name == "weight_hh":
        return _orthonormal(shape, random)
    if name in ("weight_ih", "weight_hr"):
        limit = math.sqrt(6 / sum(shape))
        return random.uniform(-limit, limit, shape)
    return drawn


def _orthonormal(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Columns of norm 1 at right angles, no direction likelier than another; not more than rows."""
    q, r = np.linalg.qr(random.standard_normal(shape))
    # Without this Q would not be uniform (Mezzadri 2007, arXiv:math-ph/0609050).
    return q * np.sign(np.diag(r))
