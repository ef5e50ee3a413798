"""PyTorch through `torch.compile`."""

from __future__ import annotations

from typing import Any

import torch

from bench.cases import Case
from bench.peers import torch as eager


def training(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """As eager PyTorch, the layer compiled."""
    return eager.training(case, cell, dtype, threads, torch.compile)


def inference(case: Case, cell: str, dtype: str, threads: int) -> Any:
    """As eager PyTorch, the layer compiled."""
    return eager.inference(case, cell, dtype, threads, torch.compile)
