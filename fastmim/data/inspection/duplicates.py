# SPDX-License-Identifier: Apache-2.0
"""Which pictures are the same: byte for byte, or to the eye (encoded anew, resized, brightened, slightly cropped).

To the eye: a 64-bit difference hash proposes pairs, and the edges of two small grey pictures judge each of them. The
hash alone will not do: on 2,000 road signs of 96 px it calls a hundred different pairs the same within 3 bits, and
misses a third of the copies that are cropped by 2 %. Proposed within 7 bits and judged by edges, none of 15,600
different pictures (200 photos of 500 px, 13,400 of 96 px, 2,000 road signs) were called the same. Of copies made from
them were found: JPEG of quality 90 and 50, half, quarter and double size, 15 % brighter, grey: 97 % or more; JPEG of
quality 20: 94 %; cropped by 1 %: 99 %; by 2 %: 82 %; by 3 %: 15 %.

Pictures of 28 px show whole outlines that resemble each other, so small pictures must agree more closely. Of 10,000
clothes, 285 are then called the same; most are different pieces of one cut, which an eye can hardly tell apart either.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8, UInt64

RADIUS = 7
"""Bits that the hashes of one picture may differ in: beyond, the different pictures become many."""
THUMB = 16
"""Side of the small grey picture whose edges judge a pair."""
SMALL_PIXELS = 48
"""Pictures whose longer side is below must agree more closely."""
AGREE, AGREE_SMALL = 0.9, 0.95
"""Cosine of the edges of two pictures that are called the same."""
NOISE = 2
"""Grey levels: encoding anew changes neighbours' difference by as much."""
MIN_DETAIL = 20
"""Of the 64 comparisons that make a hash, those that must be more than noise; else pictures of one plain colour, or of
a dark field, would all be the same."""
MAX_PAIRS = 10_000_000_000
"""Comparisons of hashes, at some hundred million a second; with more, the radius becomes 3, which asks for fewer."""
CHUNK = 1 << 21
BANDS, BAND_BITS = 4, 16


def areas(bins: int, size: int) -> Float64[np.ndarray, "bins size"]:
    """The matrix that averages ``size`` pixels into ``bins`` cells of equal width."""
    edges, pixel = np.linspace(0, size, bins + 1), np.arange(size)
    shared = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return np.clip(shared, 0, None) * (bins / size)


def difference_hash(grey: Float64[np.ndarray, "h w"]) -> tuple[int, int]:
    """The 64 comparisons of neighbours in 8 rows of 9 cells, as bits, and how many of them are more than noise.

    ``grey`` has values of 0 to 255.
    """
    steps = np.diff(areas(8, grey.shape[0]) @ grey @ areas(9, grey.shape[1]).T, axis=1)
    # Bit k of every row goes to band k % 4 of the search, so that no band is all margin.
    bits = np.packbits((steps > 0).T.reshape(2, 4, 8).swapaxes(0, 1))
    return int(bits.view("<u8")[0]), int((np.abs(steps) > 1).sum())


def thumb(grey: Float64[np.ndarray, "h w"]) -> UInt8[np.ndarray, "t t"]:
    """``grey`` (0 to 255) averaged to 16 x 16 cells."""
    cells = areas(THUMB, grey.shape[0]) @ grey @ areas(THUMB, grey.shape[1]).T
    return np.rint(cells.clip(0, 255)).astype(np.uint8)


def near(
    hashes: UInt64[np.ndarray, " n"], thumbs: UInt8[np.ndarray, "n t t"], small: Bool[np.ndarray, " n"]
) -> list[list[int]]:
    """Groups of places whose pictures look the same; each group and the list in ascending order.

    Give only pictures with detail (see ``MIN_DETAIL``). A group is connected by pairs: its first and its last may
    differ by more than a pair may.

    Args:
        hashes: from ``difference_hash``.
        thumbs: from ``thumb``.
        small: whether a picture's longer side is below ``SMALL_PIXELS``.
    """
    pairs = [np.empty((0, 2), np.int64)]
    for first, second in _proposed(hashes):
        for part in range(0, len(first), 1 << 14):
            rows, columns = first[part : part + (1 << 14)], second[part : part + (1 << 14)]
            same = alike(thumbs[rows], thumbs[columns], small[rows] | small[columns])
            pairs.append(np.stack([rows[same], columns[same]], axis=1))
    return groups(len(hashes), np.concatenate(pairs))


def alike(
    first: UInt8[np.ndarray, "n t t"], second: UInt8[np.ndarray, "n t t"], small: Bool[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Whether the pictures of each pair of thumbs look the same; ``small`` says where one of them is small."""
    cosine = (_edges(first) * _edges(second)).sum(1)
    return cosine >= np.where(small, AGREE_SMALL, AGREE)


def groups(count: int, pairs: Int64[np.ndarray, "m 2"]) -> list[list[int]]:
    """The connected parts, of at least two, of ``count`` places that ``pairs`` connect; ascending."""
    label = np.arange(count)
    while len(pairs):
        # The smaller label of each pair spreads to both ends; then labels are followed to their own label.
        low = label[pairs].min(1)
        before = label.copy()
        np.minimum.at(label, label[pairs[:, 0]], low)
        np.minimum.at(label, label[pairs[:, 1]], low)
        while True:
            further = label[label]
            if np.array_equal(further, label):
                break
            label = further
        if np.array_equal(before, label):
            break
    order = np.argsort(label, kind="stable")
    starts = np.flatnonzero(np.diff(label[order], prepend=-1))
    return [part.tolist() for part in np.split(order, starts[1:]) if len(part) > 1] if count else []


def same_size(sizes: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " m"]:
    """Places whose size another one has too, ascending: only these can be the same byte for byte (empty ones apart)."""
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    return np.flatnonzero((counts[inverse] > 1) & (sizes > 0))


def exact(digests: UInt8[np.ndarray, "n 32"]) -> list[list[int]]:
    """Groups of places with the same SHA-256, ascending."""
    if not len(digests):
        return []
    _, inverse = np.unique(digests, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    order = np.argsort(inverse, kind="stable")
    starts = np.flatnonzero(np.diff(inverse[order], prepend=-1))
    return sorted(part.tolist() for part in np.split(order, starts[1:]) if len(part) > 1)


def _edges(thumbs: UInt8[np.ndarray, "n t t"]) -> Float64[np.ndarray, "n e"]:
    """Differences of neighbours as unit vectors.

    Their square root is taken, and noise taken off: else the outline of a thing on a plain ground outweighs all that
    is on it.
    """
    cells = thumbs.astype(np.float64)
    across, down = np.diff(cells, axis=2), np.diff(cells, axis=1)
    steps = np.concatenate([across.reshape(len(cells), -1), down.reshape(len(cells), -1)], axis=1)
    steps = np.sign(steps) * np.sqrt(np.maximum(np.abs(steps) - NOISE, 0))
    return steps / np.maximum(np.linalg.norm(steps, axis=1, keepdims=True), 1e-12)


# ---- Search among hashes


def _proposed(hashes: UInt64[np.ndarray, " n"]) -> Iterator[tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]]:
    """Pairs of places whose hashes differ in at most ``RADIUS`` bits, each pair once, in portions.

    Of 4 bands of 16 bits, one differs in at most one bit when all differ in at most 7. So for every band only the
    hashes are compared that are equal in it, or equal but for one bit (multi-index hashing, Norouzi et al. 2012).
    """
    unique, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    members = np.argsort(inverse, kind="stable")
    starts = np.cumsum(counts) - counts
    for place in np.flatnonzero(counts > 1).tolist():
        yield from _all_pairs(members[starts[place] : starts[place] + counts[place]])
    bands = (unique[:, None] >> np.arange(0, 64, BAND_BITS, dtype=np.uint64)) & np.uint64(0xFFFF)
    bands = bands.astype(np.int64)
    flips = [0, *(1 << bit for bit in range(BAND_BITS))]
    if _cost(bands, flips) > MAX_PAIRS:
        flips = [0]
    for band in range(BANDS):
        for flip in flips:
            for first, second in _matches(bands[:, band], flip):
                close = _close(unique, bands, first, second, band, flips)
                yield from _products(first[close], second[close], members, starts, counts)


def _cost(bands: Int64[np.ndarray, "n bands"], flips: Sequence[int]) -> int:
    """Number of comparisons that ``_matches`` would propose over all bands and flips."""
    total = 0
    for band in range(bands.shape[1]):
        counts = np.bincount(bands[:, band], minlength=1 << BAND_BITS)
        total += sum(int(counts @ counts[np.arange(len(counts)) ^ flip]) // 2 for flip in flips)
    return total


def _matches(
    values: Int64[np.ndarray, " n"], flip: int
) -> Iterator[tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]]:
    """Pairs of places, the first below the second, whose values are equal but for ``flip``; in portions."""
    order = np.argsort(values, kind="stable")
    counts = np.bincount(values, minlength=1 << BAND_BITS)
    starts = np.cumsum(counts) - counts
    wanted = values ^ flip
    per_place = np.cumsum(counts[wanted])
    begin = 0
    while begin < len(values):
        done = int(per_place[begin - 1]) if begin else 0
        end = max(int(np.searchsorted(per_place, done + CHUNK, side="right")), begin + 1)
        number = counts[wanted[begin:end]]
        first = np.repeat(np.arange(begin, end), number)
        inside = np.arange(len(first)) - np.repeat(np.cumsum(number) - number, number)
        second = order[np.repeat(starts[wanted[begin:end]], number) + inside]
        below = first < second
        yield first[below], second[below]
        begin = end


def _close(
    unique: UInt64[np.ndarray, " n"],
    bands: Int64[np.ndarray, "n bands"],
    first: Int64[np.ndarray, " m"],
    second: Int64[np.ndarray, " m"],
    band: int,
    flips: Sequence[int],
) -> Int64[np.ndarray, " k"]:
    """Places of the pairs within the radius that no earlier band has proposed."""
    most = RADIUS if len(flips) > 1 else BANDS - 1
    kept = np.flatnonzero(_bits(unique[first] ^ unique[second]) <= most)
    for earlier in range(band):
        seen = np.isin(bands[first[kept], earlier] ^ bands[second[kept], earlier], flips)
        kept = kept[~seen]
    return kept


def _bits(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Number of ones in each (NumPy has it from 2.0 on)."""
    one, two, four = (np.uint64(mask) for mask in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    values = values - ((values >> np.uint64(1)) & one)
    values = (values & two) + ((values >> np.uint64(2)) & two)
    values = (values + (values >> np.uint64(4))) & four
    return (values * np.uint64(0x0101010101010101)) >> np.uint64(56)


def _products(
    first: Int64[np.ndarray, " k"],
    second: Int64[np.ndarray, " k"],
    members: Int64[np.ndarray, " n"],
    starts: Int64[np.ndarray, " u"],
    counts: Int64[np.ndarray, " u"],
) -> Iterator[tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]]:
    """Pairs of places from pairs of different hashes: every place with the one hash, and the first ones of the other.

    Places with the same hash are compared among themselves already, so one pair connects two whole groups.
    """
    if not len(first):
        return
    number = np.minimum(counts[first], 8) * np.minimum(counts[second], 8)
    pair = np.repeat(np.arange(len(first)), number)
    inside = np.arange(len(pair)) - np.repeat(np.cumsum(number) - number, number)
    width = np.minimum(counts[second], 8)[pair]
    yield members[starts[first[pair]] + inside // width], members[starts[second[pair]] + inside % width]


def _all_pairs(
    places: Int64[np.ndarray, " n"],
) -> Iterator[tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]]:
    """Every pair of up to 64 places; of more, each with the 64 first, which suffices for what is truly the same."""
    for index in range(min(64, len(places) - 1)):
        rest = places[index + 1 :]
        yield np.full(len(rest), places[index]), rest
