"""``python -m trine``: the same command line as ``trine``."""

from __future__ import annotations

import sys

from .launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
elif __name__ == "__mp_main__":  # a process spawned by a rank that torchrun, srun or mpirun started
    from .launch.lifeline import end_with_parent

    end_with_parent()
