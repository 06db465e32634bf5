# SPDX-License-Identifier: Apache-2.0
"""Training of any ``Task``: the loop, the optimiser, checkpoints, ranks, logs. It knows no method and no data."""
