# SPDX-License-Identifier: Apache-2.0
"""Sets of small squares, written once and read fast."""
