"""How the threads of one process wait for each other."""

from __future__ import annotations

import os


def wait_asleep() -> None:
    """Let torch's threads sleep between two parallel parts instead of spinning; call it before torch is imported.

    Searching vectors alternates between torch (OpenMP) and numpy's BLAS (threads of its own). Threads that spin for a
    part that does not come keep the other library's from their core: on two cores the search of pooled shapes took 1.75 s
    spinning and 0.62 s asleep. A wait policy that the user set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
