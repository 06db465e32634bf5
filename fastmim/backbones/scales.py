# SPDX-License-Identifier: Apache-2.0
"""Which maps of a network something is predicted from, where it is more than the last."""

from collections.abc import Sequence

from fastmim.errors import UserError


def choose_maps(strides: Sequence[int], scales: str | Sequence[int], name: str) -> tuple[int, ...]:
    """Numbers of maps, shallow to deep.

    Args:
        strides: pixels between two positions of each map that the network has.
        scales: "stages", the last map of each stride; "localmim", the last four of these, or of a network of one stride
            the second, fourth, third last and last block (LocalMIM, Wang et al. 2023, section 4); or numbers, -1 for
            the last.
        name: of the network, for the message.

    Raises:
        UserError: there are no such maps, or only one, or the last is not among them.
    """
    count = len(strides)
    stages = [place for place in range(count) if place + 1 == count or strides[place + 1] != strides[place]]
    plain = len(stages) == 1
    if scales == "stages" and plain:
        some = f"{count // 3},{2 * count // 3},-1" if count > 2 else "0,-1"
        raise UserError(
            f"scales=stages: '{name}' is a plain network, whose {count} maps all have a stride of {strides[0]} px; say"
            f" which blocks, as in --scales {some}, or take --scales localmim"
        )
    if scales == "localmim" and plain and count < 7:
        raise UserError(
            f"scales=localmim takes 4 of 7 or more blocks, but '{name}' has {count}; say which: --scales 0,-1"
        )
    if isinstance(scales, str):
        return (1, 3, count - 3, count - 1) if plain else tuple(stages if scales == "stages" else stages[-4:])
    wrong = [place for place in scales if not -count <= place < count]
    if wrong:
        raise UserError(f"scales: '{name}' has {count} maps, 0 to {count - 1}, and none with the number {wrong[0]}")
    chosen = sorted({place % count for place in scales})
    if len(chosen) < 2:
        raise UserError(f"scales: several maps are needed, not {len(chosen)}; without --scales, the last one predicts")
    if chosen[-1] != count - 1:
        behind = f", and leave out what is behind map {chosen[-1]} with --discard {count - 1 - chosen[-1]}" * plain
        raise UserError(f"scales: the last map, -1, is what is handed over; add it to the others{behind}")
    return tuple(chosen)
