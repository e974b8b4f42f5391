"""One implementation on one workload in a process of its own: `python -m benchmarks.worker`.

Commands come as lines on stdin, answers go as JSON lines behind a mark to stdout: `start` builds
and checks, `time CORE SECONDS` times steps on that core.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

MARK = "@@"
FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
WARM_STEPS, WARM_SECONDS = 60, 2.0  # varmeta drops Python overhead after 50 calls of one shape


def pin(core: int) -> None:
    """All threads of this process, also those that a library has started, to one core."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


def environment() -> dict[str, str]:
    """One thread for everybody."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **threads, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}


def main(name: str, folder: str, count: int, core: int) -> None:
    """Serve commands until stdin ends; `count` is how many of the workload's tasks are taken."""
    os.sched_setaffinity(0, {core})
    import numpy as np
    import torch

    from benchmarks.check import check
    from benchmarks.peers import PEERS
    from benchmarks.reference import Reference
    from benchmarks.workloads import Workload

    torch.set_num_threads(1)
    workload = Workload.load(Path(folder) / "workload.npz").first(count)
    with np.load(Path(folder) / "reference.npz") as saved:
        reference = Reference(**saved)
    even = np.full(count, 1 / count, np.float32)
    peer = PEERS[name]
    implementation: Any = None
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "start":
            begin = time.perf_counter()
            implementation = peer.build(workload)
            implementation.step(even)
            seconds = time.perf_counter() - begin
            result = check(peer, implementation, workload, reference).as_dict()
            stop = time.perf_counter() + WARM_SECONDS
            for _ in range(WARM_STEPS):
                if time.perf_counter() > stop or result["passed"] is False:
                    break
                implementation.step(even)
            answer = {"start_seconds": seconds, "check": result}
            if density := getattr(implementation, "density", None):  # what ran as what, if it says
                answer["execution"] = getattr(density, "execution", dict)()
        else:
            pin(int(arguments[0]))
            # CPU time: others' work on the same core would double the time on the wall.
            took: list[float] = []
            wall = time.perf_counter()
            while not took or time.perf_counter() - wall < float(arguments[1]):
                begin = time.process_time()
                implementation.step(even)
                took.append(time.process_time() - begin)
            wall = (time.perf_counter() - wall) / len(took)
            answer = {"seconds": statistics.median(took), "wall": wall}
        print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
