"""Linear and Embedding: what comes before and after a recurrent layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastrnn import gemm
from fastrnn.checks import as_array, as_dtype, as_floats, as_seed, as_size, as_tokens
from fastrnn.layout import even
from fastrnn.memory import empty
from fastrnn.module import Module, Params, new_grads
from fastrnn.options import checking_names
from fastrnn.pack import pack, pack_transposed
from fastrnn.parallel import ELEMENT, parts_for, run
from fastrnn.simd import lanes


def _order(shape: tuple[int, ...]) -> np.ndarray:
    """In which order gradients of rows (T, ...) are added up."""
    return even(math.prod(shape[:1]), math.prod(shape[1:]), 0).rows


class Linear(Module):
    """y = x W.T + b, with `weight` (out_features, in_features) and `bias` (out_features,)."""

    @checking_names
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: Any = np.float32,
        seed: int | None = None,
    ) -> None:
        self.in_features = as_size("in_features", in_features)
        self.out_features = as_size("out_features", out_features)
        self.dtype = as_dtype(dtype)
        random = np.random.default_rng(as_seed(seed))
        bound = 1 / math.sqrt(self.in_features)
        shapes: dict[str, tuple] = {"weight": (self.out_features, self.in_features)}
        if bias:
            shapes["bias"] = (self.out_features,)
        self._own(
            {
                key: random.uniform(-bound, bound, shape).astype(self.dtype)
                for key, shape in shapes.items()
            }
        )

    def __call__(self, x: Any) -> np.ndarray:
        """x (..., in_features) -> y (..., out_features)."""
        return self.forward(x)[0]

    def forward(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """y, and what backward needs (x itself)."""
        self.check_params()
        array = as_array("x", x)
        lead = (None,) * max(0, array.ndim - 1)
        names = "(" + "..., " * len(lead) + "I)"
        array = as_floats("x", array, self.dtype, (*lead, self.in_features), names)
        rows = array.reshape(-1, self.in_features)
        y = empty((len(rows), self.out_features), self.dtype)
        bias = self.params.get("bias")
        if bias is None:
            bias = np.zeros(self.out_features, self.dtype)
        weight = pack_transposed(self.params["weight"], (0,))
        parts = parts_for(rows.size * self.out_features, len(rows))
        run(gemm.affine, parts, rows, weight, bias, y)
        return y.reshape(*array.shape[:-1], self.out_features), array

    def backward(
        self, saved: np.ndarray, d_y: Any, grads: Params | None = None, *, need_d_x: bool = True
    ) -> tuple[np.ndarray | None, Params]:
        """d_x like x (None if not needed) and the gradients of the parameters."""
        self.check_params()
        lead = (None,) * max(0, np.ndim(saved) - 1)
        names = "(" + "..., " * len(lead) + "I)"
        saved = as_floats("saved", saved, self.dtype, (*lead, self.in_features), names)
        grads = new_grads(self.params, grads)
        shape = (*saved.shape[:-1], self.out_features)
        names = "(" + "..., " * (len(shape) - 1) + "O)"
        d_y = as_floats("d_y", d_y, self.dtype, shape, names)
        x = saved.reshape(-1, self.in_features)
        count = len(x)
        d_x = empty((count if need_d_x else 0, self.in_features), self.dtype)
        zeros = np.zeros(self.in_features, self.dtype)
        packed = pack(self.params["weight"], (0,), self.out_features) if need_d_x else zeros
        d_bias = grads.get("bias")
        if d_bias is None:
            d_bias = np.zeros(self.out_features, self.dtype)
        run(
            gemm.affine_gradients,
            parts_for(count * self.in_features * self.out_features, self.out_features),
            _order(saved.shape[:-1]),
            x,
            d_y.reshape(count, self.out_features),
            packed,
            zeros,
            d_x,
            grads["weight"],
            d_bias,
        )
        return (d_x.reshape(saved.shape) if need_d_x else None), grads


class Embedding(Module):
    """Rows of `weight` (num_embeddings, embedding_dim) by token."""

    @checking_names
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: Any = np.float32,
        seed: int | None = None,
    ) -> None:
        self.num_embeddings = as_size("num_embeddings", num_embeddings)
        self.embedding_dim = as_size("embedding_dim", embedding_dim)
        self.dtype = as_dtype(dtype)
        values = np.random.default_rng(as_seed(seed)).standard_normal(
            (num_embeddings, embedding_dim)
        )
        self._own({"weight": values.astype(self.dtype)})

    def __call__(self, tokens: Any) -> np.ndarray:
        """Integers (...) -> vectors (..., embedding_dim)."""
        return self.forward(tokens)[0]

    def forward(self, tokens: Any) -> tuple[np.ndarray, np.ndarray]:
        """The vectors, and what backward needs (the tokens)."""
        self.check_params()
        array = self._tokens("tokens", tokens)
        return self.params["weight"][array], array

    def backward(self, saved: np.ndarray, d_y: Any, grads: Params | None = None) -> Params:
        """The gradient of `weight` from that of the vectors."""
        saved = self._tokens("saved", saved)
        grads = new_grads(self.params, grads)
        shape = (*saved.shape, self.embedding_dim)
        names = "(" + "..., " * saved.ndim + "E)"
        d_y = as_floats("d_y", d_y, self.dtype, shape, names)
        unused = np.zeros(self.embedding_dim, self.dtype)
        parts = parts_for(d_y.size * ELEMENT, self.embedding_dim // lanes(self.dtype))
        d_y = d_y.reshape(-1, self.embedding_dim)
        run(
            gemm.scatter_rows,
            parts,
            saved.reshape(-1),
            _order(saved.shape),
            d_y,
            grads["weight"],
            unused,
        )
        return grads

    def _tokens(self, name: str, tokens: Any) -> np.ndarray:
        array = as_array(name, tokens)
        names = "(" + ", ".join(["..."] * array.ndim) + ")"
        return as_tokens(name, array, self.num_embeddings, (None,) * array.ndim, names)
