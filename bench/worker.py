"""One contestant in a process of its own: answers requests, a JSON line each."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from bench.cases import CASES
from bench.contestants import CONTESTANTS, reference


def _distance(found: Any, wanted: Any) -> float:
    """Relative distance in norm."""
    difference = np.asarray(found, dtype="f8") - wanted
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted))


def main() -> None:
    name, threads = sys.argv[1], int(sys.argv[2])
    out = sys.stdout
    sys.stdout = sys.stderr
    step = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "set":
                case = CASES[request["case"]]
                start = time.perf_counter()
                step = CONTESTANTS[name](case, request["cell"], request["dtype"], threads)
                y, d_x, grads = step()
                first = time.perf_counter() - start
                wanted = reference(case, request["cell"])
                pairs = [(y, wanted[0]), (d_x, wanted[1])]
                pairs += [(grads[key], value) for key, value in wanted[2].items()]
                # Not max(), which can lose a NaN.
                error = float(np.max([_distance(*pair) for pair in pairs]))
                answer = {"first": first, "error": error}
                for _ in range(2):
                    step()
            else:
                times = []
                end = time.perf_counter() + request["seconds"]
                while len(times) < 3 or time.perf_counter() < end:
                    start = time.perf_counter()
                    step()
                    times.append(time.perf_counter() - start)
                answer = {"times": times}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
