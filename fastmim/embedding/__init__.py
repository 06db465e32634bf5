# SPDX-License-Identifier: Apache-2.0
"""``fastmim embed``: what a network says of every image, as one vector each, in a file that other tools read."""
