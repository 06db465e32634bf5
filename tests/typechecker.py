# SPDX-License-Identifier: Apache-2.0
"""What checks every annotation of the package, shapes included, while the tests run."""

from beartype import BeartypeConf, beartype

# As type checkers read it: an int may stand where a float is asked for.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
