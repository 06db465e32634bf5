# SPDX-License-Identifier: Apache-2.0
"""What images are like, before they are trained on: ``fastmim scan``."""
