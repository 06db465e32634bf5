# SPDX-License-Identifier: Apache-2.0
"""Where images are: folders, lists, archives, datasets and object stores, as one table."""
