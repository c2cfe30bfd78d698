"""The results of a vLLM step against a plain loop over tokens."""

from __future__ import annotations

import random

import numpy as np

from pvec.backends.vllm.token_rows import RequestMetadata, TokenRowMap


def _steps(row_map: TokenRowMap, *parts: tuple[str, int, int]) -> tuple[list[int], list[int]]:
    names = [name for name, _, _ in parts]
    first = np.array([first for _, first, _ in parts], dtype=np.int32)
    counts = np.array([count for _, _, count in parts], dtype=np.int32)
    steering, summed = row_map.step(names, first, counts)
    return steering.tolist(), summed.tolist()


def test_tokens_are_classified_by_position_whatever_the_chunks() -> None:
    row_map = TokenRowMap()
    row_map.open("a", RequestMetadata(key=1, slot=2, prompt=5))
    assert _steps(row_map, ("a", 0, 3)) == ([4, 4, 4], [0, 0, 0])
    assert _steps(row_map, ("stranger", 0, 2), ("a", 3, 2)) == ([0, 0, 4, 5], [0] * 4)
    assert _steps(row_map, ("a", 5, 1)) == ([6], [0])
    counts = row_map.close(1)
    assert counts is not None
    assert (counts.cached, counts.high, counts.gaps) == (0, 6, 0)


def test_a_resumed_request_is_steered_again_and_summed_never() -> None:
    row_map = TokenRowMap()
    row_map.open("a", RequestMetadata(key=1, slot=1, prompt=3, edges=(0, 3), rows=(0, 7, 8)))
    assert _steps(row_map, ("a", 0, 4)) == ([1, 1, 2, 3], [7, 7, 7, 8])
    row_map.open("a-again", RequestMetadata(key=1, slot=1, prompt=3, edges=(0, 3), rows=(0, 7, 8)))
    assert _steps(row_map, ("a-again", 0, 6)) == ([1, 1, 2, 3, 3, 3], [0, 0, 0, 0, 8, 8])
    counts = row_map.close(1)
    assert counts is not None
    assert (counts.high, counts.gaps) == (6, 0)


def test_cached_and_skipped_positions_are_in_the_counts() -> None:
    row_map = TokenRowMap()
    row_map.open("a", RequestMetadata(key=1, slot=1, prompt=9))
    _steps(row_map, ("a", 4, 2))
    _steps(row_map, ("a", 8, 1))
    counts = row_map.close(1)
    assert counts is not None
    assert (counts.cached, counts.high, counts.gaps) == (4, 9, 2)
    assert row_map.close(1) is None


def test_records_are_reused_and_the_books_grow_with_the_traffic() -> None:
    row_map = TokenRowMap(capacity=2)
    for round_ in range(3):
        for key in range(50):
            row_map.open(f"r{key}", RequestMetadata(key=key, slot=key + 1, prompt=1))
        steering, _ = _steps(row_map, *((f"r{key}", 0, 1) for key in range(50)))
        assert steering == [1 + 3 * key + 1 for key in range(50)], round_
        for key in range(50):
            assert row_map.close(key) is not None


def test_a_shuffled_batch_equals_a_plain_loop() -> None:
    draw = random.Random(0)
    row_map = TokenRowMap()
    metadata_of = {}
    for key in range(20):
        prompt = draw.randrange(1, 9)
        metadata_of[f"r{key}"] = RequestMetadata(
            key=key,
            slot=draw.randrange(4),
            prompt=prompt,
            edges=(0, prompt - 1, prompt),
            rows=(0, 3 * key + 1, 3 * key + 2, 3 * key + 3),
        )
        row_map.open(f"r{key}", metadata_of[f"r{key}"])
    at = dict.fromkeys(metadata_of, 0)
    for _ in range(15):
        names = draw.sample(sorted(metadata_of), k=7)
        parts = [(name, at[name], draw.randrange(1, 5)) for name in names]
        wanted = ([], [])
        for name, first, count in parts:
            metadata = metadata_of[name]
            for place in range(first, first + count):
                role = (
                    0 if place < metadata.prompt - 1 else 1 if place == metadata.prompt - 1 else 2
                )
                wanted[0].append(1 + 3 * (metadata.slot - 1) + role if metadata.slot else 0)
                wanted[1].append(3 * metadata.key + 1 + role)
            at[name] += count
        assert _steps(row_map, *parts) == wanted
