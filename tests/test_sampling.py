"""Who gets which image: every sample once, the same order for a seed, ragged ends, ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idml.data.sampling import eval_batches, num_train_batches, train_batches


@given(st.integers(1, 300), st.integers(1, 16), st.integers(1, 4), st.integers(0, 5), st.integers(0, 3), st.booleans())
def test_every_sample_once_over_all_ranks(
    num_samples: int, per_rank: int, world_size: int, seed: int, epoch: int, train: bool
) -> None:
    batch_size = per_rank * world_size
    ranks = range(world_size)
    if train:
        batches = [
            train_batches(num_samples, batch_size, seed=seed, epoch=epoch, rank=rank, world_size=world_size)
            for rank in ranks
        ]
        assert {len(rank) for rank in batches} == {num_train_batches(num_samples, batch_size, world_size)}
    else:
        batches = [eval_batches(num_samples, per_rank, rank=rank, world_size=world_size) for rank in ranks]
        assert all(len(batch) <= per_rank for rank in batches for batch in rank)
    seen = np.concatenate([batch for rank in batches for batch in rank] or [np.empty(0, int)])
    assert np.array_equal(np.sort(seen), np.arange(num_samples))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int, batch_size: int = 8, world_size: int = 1) -> list[int]:
        ranks = [
            train_batches(100, batch_size, seed=seed, epoch=epoch, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        steps = [np.sort(np.concatenate(step)) for step in zip(*ranks, strict=True)]
        return np.concatenate(steps).tolist()

    assert order(1, 0) == order(1, 0) == order(1, 0, world_size=2)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_a_short_tail_is_joined_to_the_batch_before() -> None:
    assert [len(batch) for batch in train_batches(17, 8, seed=0, epoch=0)] == [8, 9]
    assert [len(batch) for batch in train_batches(18, 8, seed=0, epoch=0)] == [8, 8, 2]
    assert [len(batch) for batch in train_batches(19, 8, seed=0, epoch=0, rank=1, world_size=2)] == [4, 5]
    assert [len(batch) for batch in train_batches(5, 8, seed=0, epoch=0)] == [5]
    assert [len(batch) for batch in eval_batches(17, 8)] == [8, 8, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_keeps_the_order(world_size: int) -> None:
    first = np.concatenate(eval_batches(20, 3, rank=0, world_size=world_size))
    assert np.array_equal(first, np.arange(0, 20, world_size))
