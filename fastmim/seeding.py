# SPDX-License-Identifier: Apache-2.0
"""Randomness as a pure function: every random number comes from (seed, purpose, position), never from a global state.

That is why a run is the same with any number of loader workers and after any interruption, and why the state of the
data is one integer.
"""

import hashlib
import struct


def derive(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed for one purpose at one position, such as ``derive(seed, "crop", epoch, index)``.

    63 bits, so that it fits a signed 64-bit tensor and every generator of Python, NumPy and torch.
    """
    message = purpose.encode() + struct.pack(f"<{1 + len(position)}q", seed, *position)
    digest = hashlib.blake2b(message, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
