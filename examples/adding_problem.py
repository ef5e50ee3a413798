"""The adding problem of Hochreiter and Schmidhuber (1997): long memory, features in, number out.

Each step brings a random number and a mark; the target is the sum of the two marked numbers.
Always answering 1 has a mean squared error of 0.167.

python examples/adding_problem.py [--steps N] [--length T]
"""

import argparse

import numpy as np

import fastrnn
from fastrnn.clip import clip_grad_norm_
from fastrnn.optim import Adam

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--length", type=int, default=50)
options = parser.parse_args()

random = np.random.default_rng(0)
B, T, H = 64, options.length, 64


def draw() -> tuple[np.ndarray, np.ndarray]:
    x = np.zeros((T, B, 2), np.float32)
    x[:, :, 0] = random.random((T, B))
    first, second = random.integers(0, T // 2, B), random.integers(T // 2, T, B)
    x[first, range(B), 1] = x[second, range(B), 1] = 1
    return x, (x[:, :, 0] * x[:, :, 1]).sum(0)[:, None]


gru, head = fastrnn.GRU(2, H, seed=0), fastrnn.Linear(H, 1, seed=1)
params = {f"gru.{k}": v for k, v in gru.params.items()}
params |= {f"head.{k}": v for k, v in head.params.items()}
optimizer = Adam(params, lr=3e-3)

for step in range(1, options.steps + 1):
    x, target = draw()
    _, h, saved = gru.forward(x)
    y, saved_head = head.forward(h[-1])
    error = y - target
    d_h, head_grads = head.backward(saved_head, 2 / B * error)
    _, _, gru_grads = gru.backward(saved, None, d_h[None], need_d_x=False)
    grads = {f"gru.{k}": v for k, v in gru_grads.items()}
    grads |= {f"head.{k}": v for k, v in head_grads.items()}
    clip_grad_norm_(grads, 1.0)
    optimizer.step(grads)
    if step % max(1, options.steps // 6) == 0:
        print(f"step {step}: mean squared error {np.mean(error**2):.4f}")
