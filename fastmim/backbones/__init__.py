# SPDX-License-Identifier: Apache-2.0
"""Networks that turn images into dense maps, and the ways to hide parts of an image from them."""
