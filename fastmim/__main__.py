# SPDX-License-Identifier: Apache-2.0
"""``python -m fastmim`` is the ``fastmim`` command."""

import sys

from fastmim.cli import main

sys.exit(main())
