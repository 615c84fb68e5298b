"""Runs the trainer as several processes, as accelerate starts them: one for each rank.

    python -m tests.training.ranks PROCESSES OPTIONS...

On Linux the ranks are forks of one process that has imported everything, which takes longer than
what the tests train.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys

from tests.training import conftest, tinybases  # noqa: F401 (they register bases)
from training.train_dmp import main


def _rank(rank: int, processes: int, port: int, options: list[str]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "CCL_WORKER_COUNT": "1",
    }  # fmt: skip
    sys.exit(main(options))


def _start(processes: int, options: list[str]) -> int:
    """Runs all ranks to their end; returns 0 where all of them did."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ranks = [
        context.Process(target=_rank, args=(rank, processes, port, options))
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
    return int(any(rank.exitcode != 0 for rank in ranks))


if __name__ == "__main__":
    sys.exit(_start(int(sys.argv[1]), sys.argv[2:]))
