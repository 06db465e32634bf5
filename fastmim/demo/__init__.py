# SPDX-License-Identifier: Apache-2.0
"""The main job on photos that ship with the package (or on Imagenette, with the network)."""
