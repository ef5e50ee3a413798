"""Pictures of what happens inside; needs matplotlib (`pip install "fastrnn[plot]"`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastrnn.checks import as_array


def gradient_flow(flow: Any, labels: Sequence[str] | None = None, ax: Any = None) -> Any:
    """Draw how the gradient of the loss in h vanishes or explodes on its way back through time.

    flow    (rows, T), or (rows, T, B): the fourth result of `backward(..., return_flow=True)`; of
            several sequences the root of the mean of squares is drawn, of those that take the step
    labels  one for each row: each layer, or each direction of each layer; "0", "1", ... by default
    ax      matplotlib axes to draw on; a new figure by default
    Returns the axes.
    """
    array = as_array("flow", flow)
    if array.ndim not in (2, 3):
        raise ValueError(f"flow: expected shape (rows, T) or (rows, T, B), got {array.shape}")
    norms = array.astype(np.float64)
    if array.ndim == 3:
        taking = np.maximum(1, (norms > 0).sum(axis=2))
        norms = np.sqrt((norms**2).sum(axis=2) / taking)
    if labels is None:
        labels = [str(i) for i in range(len(norms))]
    if len(labels) != len(norms):
        raise ValueError(
            f"labels: expected {len(norms)}, one for each row of flow, got {len(labels)}"
        )
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(layout="constrained").subplots()
    for row, label in zip(norms, labels, strict=True):
        # A logarithm has no zeros: steps that nothing comes back to are left out.
        ax.plot(np.where(row > 0, row, np.nan), label=label)
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("norm of dL/dh")
    ax.legend()
    return ax
