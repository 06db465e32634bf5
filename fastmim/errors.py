# SPDX-License-Identifier: Apache-2.0
"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Something the user can mend: one line that says what was wrong, where, and what would work.

    The command line prints the line and exits with code 2; no traceback. Raise it for bad input only, never for a
    fault of ours.
    """
