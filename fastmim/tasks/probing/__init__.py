# SPDX-License-Identifier: Apache-2.0
"""Did pre-training help? Frozen features judged by labels: a file for each way to judge, and what compares them."""
