"""A cell of your own: the minimal gated unit of Zhou et al. (2016, arXiv:1603.09420).

    f  = sigmoid(W_f x + U_f h + b_f)
    n  = tanh(W_n x + U_n (f h) + b_n)
    h' = (1 - f) h + f n

Two products instead of a GRU's three. The cell is compiled into the same kernels as ours, cached on
disk like them, and has all that they have: batches, threads, lengths, dropout, both directions.

python examples/minimal_gated_unit.py [--steps N]
"""

import argparse

import numpy as np

import fastrnn
from fastrnn.cells import Cell, fma, helper, sigmoid, tanh
from fastrnn.clip import clip_grad_norm_
from fastrnn.optim import Adam

# Each function works on one register of hidden units. The registers of a step are
#   n, f    begin with W x + b; f receives U_f h, too
#   a       U_n m, the product of what `gates` leaves in m: it comes between both functions
#   m       f h
#   more    for backward


@helper
def gates(s, h, carry):
    n, f, a, _, more = s
    f = sigmoid(f)
    return (n, f, a, f * h, more), carry


@helper
def output(tape, h, carry):
    n, f, a, m, more = tape
    n = tanh(n + a)
    return fma(f, n - h, h), (n, f, a, m, more)


@helper
def backward(tape, h_prev, h, carry_prev, carry, d_h, d_carry):
    n, f, _, m, _ = tape
    d_n = d_h * f * (1.0 - n * n)
    # f waits for what comes back through m.
    return (d_n, f, d_n, m, d_h * (n - h_prev)), d_h * (1.0 - f), d_carry


@helper
def backward_operand(tape, h_prev, d_m):
    d_n, f, d_a, m, d_f = tape
    d_f = fma(d_m, h_prev, d_f) * (f * (1.0 - f))
    return (d_n, d_f, d_a, m, d_f), d_m * f


MGU = Cell(
    name="mgu",
    gates=2,  # rows of the weights: f, n
    tape=5,
    carries=0,  # states beyond h
    order_x=(1, 0),  # registers 0, 1 begin with gates 1, 0 of W x
    tail=1,
    order_h=(0,),  # register 1 receives gate 0 of U h
    order_late=(1,),  # gate 1 of U multiplies
    operand=3,  # register 3, and is added to
    into=2,  # register 2
    gates_of=gates,
    output=output,
    backward=backward,
    backward_operand=backward_operand,
    gate_names=("n", "f", "", "", ""),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    T, B, H = 30, 64, 48
    mgu, head = fastrnn.Recurrent(MGU, 1, H, seed=0), fastrnn.Linear(H, 1, seed=1)
    params = {f"mgu.{k}": v for k, v in mgu.params.items()}
    params |= {f"head.{k}": v for k, v in head.params.items()}
    optimizer = Adam(params, lr=3e-3)
    for step in range(1, options.steps + 1):
        # How many of the steps so far were ones?
        x = (random.random((T, B, 1)) < 0.5).astype(np.float32)
        target = np.cumsum(x, axis=0) / T
        y, _, saved = mgu.forward(x)
        guess, saved_head = head.forward(y)
        error = guess - target
        d_y, head_grads = head.backward(saved_head, (2 / error.size) * error)
        _, _, mgu_grads = mgu.backward(saved, d_y, need_d_x=False)
        grads = {f"mgu.{k}": v for k, v in mgu_grads.items()}
        grads |= {f"head.{k}": v for k, v in head_grads.items()}
        clip_grad_norm_(grads, 1.0)
        optimizer.step(grads)
        if step % max(1, options.steps // 4) == 0:
            print(f"step {step}: mean squared error {np.mean(error**2):.5f}")


if __name__ == "__main__":
    main()
