# SPDX-License-Identifier: Apache-2.0
"""What a run can do, put together from data, backbones and mim."""
