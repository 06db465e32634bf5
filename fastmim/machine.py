# SPDX-License-Identifier: Apache-2.0
"""What the machine has for this process."""

import os


def cores() -> int:
    """Cores that this process may use, which can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
