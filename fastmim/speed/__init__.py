# SPDX-License-Identifier: Apache-2.0
"""``fastmim bench``: how fast each method trains on this machine."""
