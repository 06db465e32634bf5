# SPDX-License-Identifier: Apache-2.0
"""fastmim compare: the same labels, splits, budget and seeds for every start, and a verdict that can be no."""
