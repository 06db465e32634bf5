# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other projects, read safely and brought to timm's keys: `read_official` and `describe`."""

from fastmim.backbones.official.imported import Imported, describe, read_official

__all__ = ["Imported", "describe", "read_official"]
