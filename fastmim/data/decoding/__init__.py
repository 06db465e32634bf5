# SPDX-License-Identifier: Apache-2.0
"""One file's bytes to upright pixels, only as large as they are needed."""
