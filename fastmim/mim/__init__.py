# SPDX-License-Identifier: Apache-2.0
"""Masked image modelling: what is hidden, what is predicted, by what, and the objective."""
