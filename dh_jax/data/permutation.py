"""A pseudo-random permutation evaluated point by point: the order of an epoch, held nowhere."""

from __future__ import annotations

import numba
import numpy as np

ROUNDS = 4  # the least that Luby and Rackoff prove strong
ROUNDS_OF_FEW = 16  # on a few bits each round mixes little
FEW_BITS = 10


@numba.njit(cache=True, nogil=True)
def permuted(start, stop, count, seed):  # type: ignore[no-untyped-def]
    """Places ``start:stop`` of a permutation of ``range(count)``.

    A Feistel network (Luby and Rackoff 1988) on the bits that hold ``count``, the halves differing
    by one bit where their number is odd, with a finaliser of splitmix64's kind (Steele et al.
    2014) as round function. What falls outside is encrypted again until it falls inside ("cycle
    walking", Black and Rogaway 2002), on average less than twice.

    Args:
        start: first place.
        stop: behind the last place, at most ``count``.
        count: elements, up to 2**62.
        seed: int, chooses the permutation.

    Returns:
        [stop - start] int64.
    """
    bits = 1
    while (np.int64(1) << bits) < count:
        bits += 1
    low = np.uint64(bits // 2)  # bits of the half that is mixed in even rounds
    high = np.uint64(bits) - low
    low_mask = (np.uint64(1) << low) - np.uint64(1)
    high_mask = (np.uint64(1) << high) - np.uint64(1)
    rounds = ROUNDS_OF_FEW if bits < FEW_BITS else ROUNDS
    keys = np.empty(rounds, np.uint64)
    for k in range(rounds):
        keys[k] = _mix(np.uint64(seed) * np.uint64(ROUNDS_OF_FEW) + np.uint64(k))
    limit = np.uint64(count)
    places = np.empty(stop - start, np.int64)
    for i in range(stop - start):
        x = np.uint64(start + i)
        while True:
            left, right = x >> low, x & low_mask
            for k in range(0, rounds, 2):
                left ^= _mix(right ^ keys[k]) & high_mask
                right ^= _mix(left ^ keys[k + 1]) & low_mask
            x = (left << low) | right
            if x < limit:
                break
        places[i] = np.int64(x)
    return places


@numba.njit(cache=True, nogil=True, inline="always")
def _mix(x):  # type: ignore[no-untyped-def]
    x += np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
