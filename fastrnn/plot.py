"""Pictures of what happens inside; needs matplotlib (`pip install "fastrnn[plot]"`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastrnn.axes import Axes
from fastrnn.checks import as_array


def gradient_flow(
    flow: Any, labels: Sequence[str] | None = None, ax: Any = None, *, lengths: Any = None
) -> Any:
    """Draw how the gradient of the loss in h vanishes or explodes on its way back through time.

    flow    (rows, T), or (rows, T, B): the fourth result of `backward(..., return_flow=True)`; of
            several sequences the root of the mean of squares is drawn, of those that take the step,
            also where nothing comes back to them
    labels  one for each row: each layer, or each direction of each layer; "0", "1", ... by default
    ax      matplotlib axes to draw on; a new figure by default
    lengths how many steps each sequence takes, if `forward` had them: (B,) integers from 0 to T or
            a boolean mask (T, B), like the flow also with batch_first; all T by default
    Returns the axes.
    """
    array = as_array("flow", flow)
    if array.ndim not in (2, 3):
        raise ValueError(f"flow: expected shape (rows, T) or (rows, T, B), got {array.shape}")
    unbatched = array.ndim == 2
    squares = (array[:, :, None] if unbatched else array).astype(np.float64) ** 2
    _, steps, batch = squares.shape
    ends = Axes(steps, batch, False, unbatched).lengths(lengths)
    taken = np.arange(steps)[:, None] < ends
    norms = np.sqrt((squares * taken).sum(axis=2) / np.maximum(1, taken.sum(axis=1)))
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
