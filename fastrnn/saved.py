"""What backward needs from forward."""

from __future__ import annotations

import numpy as np

from fastrnn.axes import Axes
from fastrnn.layout import Drawing, Layout
from fastrnn.stack import Made


class Saved:
    """What backward needs from forward. Backward works in this memory: it can be used once."""

    def __init__(
        self,
        kind: tuple,
        layers: list[Made],
        pieces: list[Layout],
        table: np.ndarray | None,
        seeds: range,
        drawing: Drawing,
        axes: Axes,
        learned: bool,
    ) -> None:
        self.kind = kind
        self._layers: list[Made] | None = layers
        self.pieces = pieces
        # A view, since backward relies on the shape.
        self.table = None if table is None else table.view()
        self.seeds = seeds
        self.drawing = drawing
        self.axes = axes
        self.learned = learned

    @property
    def nbytes(self) -> int:
        """Bytes held: B*(T*tape*Hp + (T+1)*(H + carries*Hp)) numbers for each layer and direction.

        Hp: see recurrence. T*B is the sum of `lengths` if they are given, and each reset counts as
        a sequence more. With a projection P stands in place of H. With `recurrent_dropout` it is
        B*(T+1)*H more, with layer_norm B*T*3. With `checkpoint_every`: the states in between, and
        of the last layer this for the last steps, whose h lies in the memory of the output.
        Beside them what comes into each layer is kept: x itself, or a copy in another order, and
        what dropout made.
        """
        return sum(made.nbytes for made in self._layers or ())

    def take(self, retain: bool) -> list[Made]:
        if self._layers is None:
            raise ValueError(
                "saved: expected the result of a new forward, got one that backward has used; "
                "call forward again, or backward(..., retain=True) the first time"
            )
        layers = self._layers
        if retain:
            return [made.copy() for made in layers]
        self._layers = None
        return layers
