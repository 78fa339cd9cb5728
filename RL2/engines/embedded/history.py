"""Tokens that were sampled or read before, and the places at which the same tokens led on to others.

A table maps the last few tokens of a sequence to the token that followed them when they were seen last, and each token
is linked to its successor. A draft is the chain that begins there: a sibling's answer, an answer of an earlier epoch,
an earlier turn, or the sequence itself. Everything has a fixed size. A wrong or overwritten entry makes a bad draft,
never a wrong sample.

Shapes: N tokens, R rows (a sequence each), C tokens of context, M levels of context, K tokens of a draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

LEVELS = ((8, True), (4, True), (8, False), (2, True))
"""Levels of context, the most telling first: number of tokens, and whether within one group alone."""
CONTEXT = max(number for number, _ in LEVELS)
HISTORY_BITS = 21
"""Size of the history, as the power of two of its tokens; it takes 40 bytes for each."""
MAX_ROOTS, MAX_PROMPTS = 2**16, 2**10
"""Prompts that are known as the beginnings of later ones, and those that need not be read again."""

_FACTORS_C = np.random.default_rng(0).integers(2**63, size=CONTEXT, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_SALTS_M = np.random.default_rng(1).integers(2**63, size=len(LEVELS), dtype=np.uint64)
_IS_GROUP_M = np.array([is_group for _, is_group in LEVELS], dtype=np.uint64)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_HIGH = np.uint64(29)


@dataclass(eq=False)
class Trail:
    """A sequence in the history."""

    group: int
    """Number that all sequences of a prompt share."""
    tail: list[int]
    """Last tokens that the history has."""
    record: int = 0
    """Place of the last token."""
    length: int = 0
    """Number of tokens that the history has got."""
    streak: int = 0
    """Number of right guesses in a row up to now."""


class History:
    """Tokens seen so far, the oldest of which are overwritten."""

    def __init__(self, bits: int = HISTORY_BITS) -> None:
        self.bits = bits
        size = 1 << bits
        self.token = np.zeros(size, dtype=np.int32)
        self.token[0] = -1
        self.next = np.zeros(size, dtype=np.int32)
        """Place of the next token of the same sequence; 0: there is none."""
        self.found = np.zeros(size * 4, dtype=np.int32)
        """Place of the token that followed a context, by its hash; 0: none."""
        self.check = np.zeros(size * 4, dtype=np.uint32)
        """Other bits of the hash."""
        self.used = 1
        self.roots: set[int] = set()
        """Hashes of prompts that began a group."""
        self.prompts: dict[tuple[int, ...], Trail] = {}
        """The prompts that were read last."""

    def follow(self, prompt: list[int]) -> Trail:
        """Begin a sequence with `prompt`. If an earlier prompt is the beginning of this one, both are of one group."""
        key = tuple(prompt)
        if key not in self.prompts:
            if len(self.prompts) >= MAX_PROMPTS:
                self.prompts.clear()
            self.prompts[key] = self._read(prompt)
        return replace(self.prompts[key])

    def _read(self, prompt: list[int]) -> Trail:
        ids_N = np.array(prompt, dtype=np.int64).astype(np.uint64)
        power_N = np.multiply.accumulate(np.full(len(ids_N), _SPREAD))
        hashes = ((ids_N + _SALTS_M[0]) * power_N).cumsum().tolist()
        root = next((each for each in hashes if each in self.roots), hashes[-1])
        if len(self.roots) >= MAX_ROOTS:
            self.roots.clear()
        self.roots.add(root)
        trail = Trail(root, [])
        self.extend([trail], [prompt])
        return trail

    def extend(self, trails: Sequence[Trail], new: Sequence[Sequence[int]]) -> None:
        """Add tokens to sequences."""
        if not any(new):
            return
        flat: list[int] = []
        ends, counts = [], []
        for trail, tokens in zip(trails, new, strict=True):
            flat += [-1] * (CONTEXT - len(trail.tail)) + trail.tail
            flat += tokens
            ends.append(len(flat))
            counts.append(len(tokens))
        count_R, end_R = np.array(counts), np.array(ends)
        total = len(flat) - CONTEXT * len(trails)
        flat_N = np.array(flat, dtype=np.int64)
        within_N = np.arange(total) - np.repeat(count_R.cumsum() - count_R, count_R)
        at_N = np.repeat(end_R - count_R, count_R) + within_N
        group_N = np.repeat(np.array([trail.group for trail in trails], dtype=np.uint64), count_R)
        place_MN, check_MN = self._hashed(flat_N[at_N[:, None] + np.arange(-CONTEXT, 0)], group_N)
        record_N = (self.used + np.arange(total)) % len(self.token)
        record_N[record_N == 0] = 1  # 0 means none
        self.used = (self.used + total) % len(self.token)
        self.token[record_N], self.next[record_N] = flat_N[at_N], 0
        is_first_N = within_N == 0
        before_N = np.where(is_first_N, 0, np.roll(record_N, 1))
        before_N[is_first_N] = [trail.record for trail, count in zip(trails, counts, strict=True) if count]
        self.next[before_N] = record_N
        self.next[0] = 0
        self.found[place_MN], self.check[place_MN] = record_N, check_MN
        last_R = count_R.cumsum() - 1
        for trail, tokens, last, count in zip(trails, new, last_R.tolist(), counts, strict=True):
            if count:
                trail.length += count
                trail.record = int(record_N[last])
                trail.tail = [*trail.tail, *tokens[-CONTEXT:]][-CONTEXT:]

    def continuations(self, trails: Sequence[Trail], number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens that followed each sequence's last ones before, int32 [R, K], and their level [R].

        The level is -1 where nothing is known; a chain that ends early is filled with -1.
        """
        tail_RC = np.array([[-1] * (CONTEXT - len(trail.tail)) + trail.tail for trail in trails])
        group_R = np.array([trail.group for trail in trails], dtype=np.uint64)
        place_MR, check_MR = self._hashed(tail_RC, group_R)
        record_MR = np.where(self.check[place_MR] == check_MR, self.found[place_MR], 0)
        is_known_MR = record_MR > 0
        level_R = np.where(is_known_MR.any(0), is_known_MR.argmax(0), -1)
        record_R = record_MR[level_R, np.arange(len(trails))]
        chain = [record_R]
        for _ in range(number - 1):
            chain.append(self.next[chain[-1]])
        return self.token[np.stack(chain, 1)], level_R

    def _hashed(self, context_NC: np.ndarray, group_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the place in the table and the other bits of the hash of each context, [M, N]."""
        parts_NC = (context_NC + 2).astype(np.uint64) * _FACTORS_C
        sum_MN = np.stack([parts_NC[:, -number:].sum(1) for number, _ in LEVELS])
        key_MN = (sum_MN + _SALTS_M[:, None] + _IS_GROUP_M[:, None] * group_N) * _SPREAD
        key_MN = (key_MN ^ (key_MN >> _HIGH)) * _FACTORS_C[0]
        return (key_MN >> np.uint64(62 - self.bits)).astype(np.int64), key_MN.astype(np.uint32)
