"""Gradients that explode, and what clipping does about them.

A plain tanh network whose recurrent weights are a little too large: the gradient of the loss at the
last step grows on its way back, and one step of plain gradient descent throws the weights away.
Clipping by norm keeps its direction, clipping by value does not; both keep it in bounds (Pascanu et
al. 2013, arXiv:1211.5063). Prints the norm of dL/dh along the way, and the losses.

python examples/exploding.py [--steps N] [--plot flow.png]
"""

import argparse

import numpy as np

import fastrnn
from fastrnn.clip import clip_grad_norm_, clip_grad_value_

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--plot", help="file for a picture; needs matplotlib")
options = parser.parse_args()

T, B, H = 60, 32, 32
random = np.random.default_rng(0)
x = random.standard_normal((T, B, 1)).astype(np.float32) * 0.1
target = np.sign(x[0])  # what came first, asked for at the end

CLIPS = {
    "none": lambda grads: None,
    "by norm": lambda grads: clip_grad_norm_(grads, 1.0),
    "by value": lambda grads: clip_grad_value_(grads, 0.1),
}
flows = {}
for name, clip in CLIPS.items():
    rnn = fastrnn.RNN(1, H, seed=0, init="glorot")
    rnn.params["weight_hh_l0"] *= np.float32(1.5)
    head = fastrnn.Linear(H, 1, seed=1)
    losses = []
    for _ in range(options.steps):
        _, h, saved = rnn.forward(x)
        y, saved_head = head.forward(h[-1])
        error = y - target
        losses.append(float(np.mean(error**2)))
        d_h, head_grads = head.backward(saved_head, (2 / B) * error)
        _, _, grads, flow = rnn.backward(saved, None, d_h[None], need_d_x=False, return_flow=True)
        flows.setdefault(name, flow)
        grads |= {f"head.{key}": value for key, value in head_grads.items()}
        clip(grads)
        for key, value in grads.items():
            of = head.params if key.startswith("head.") else rnn.params
            of[key.removeprefix("head.")] -= np.float32(0.05) * value
    print(f"clipping {name}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")

norms = np.sqrt((flows["none"][0].astype(np.float64) ** 2).mean(axis=1))
print("norm of dL/dh at first, step by step back from the end:")
print("  " + "  ".join(f"{step}: {norms[step]:.1e}" for step in range(T - 1, -1, -10)))

if options.plot:
    from fastrnn.plot import gradient_flow

    ax = gradient_flow(flows["none"], ["before training"])
    ax.figure.savefig(options.plot)
