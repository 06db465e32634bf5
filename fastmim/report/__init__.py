# SPDX-License-Identifier: Apache-2.0
"""One HTML file about a run, or about several side by side; it needs no network, now or later."""

from fastmim.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
