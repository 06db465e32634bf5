# SPDX-License-Identifier: Apache-2.0
"""From folders to batches: scan finds files, decode reads one, augment chooses the crop, loader makes batches."""
