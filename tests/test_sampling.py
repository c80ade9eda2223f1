"""Who gets which image: every sample once, the same order for a seed, ragged ends, ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idml.data.sampling import (
    balanced_batches,
    eval_batches,
    num_balanced_batches,
    num_train_batches,
    train_batches,
)


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


@st.composite
def balanced_cases(draw: st.DrawFn) -> dict[str, Any]:
    """Labels in any order, and a batch of several classes that divides over the ranks."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    names = draw(st.permutations(range(0, 3 * len(sizes), 3)))  # class numbers may have gaps
    labels = draw(st.permutations([name for name, size in zip(names, sizes, strict=True) for _ in range(size)]))
    per_class, classes = draw(st.integers(1, 6)), draw(st.integers(1, len(sizes)))
    batch_size = per_class * classes
    world_size = draw(st.sampled_from([ranks for ranks in (1, 2, 3, 4) if batch_size % ranks == 0]))
    return {
        "labels": np.array(labels),
        "batch_size": batch_size,
        "per_class": per_class,
        "seed": draw(st.integers(0, 3)),
        "epoch": draw(st.integers(0, 3)),
        "world_size": world_size,
    }


@given(balanced_cases())
def test_balanced_batches_are_dealt_out_to_the_ranks(case: dict[str, Any]) -> None:
    world_size = case.pop("world_size")
    whole = balanced_batches(**case)
    shares = [balanced_batches(**case, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {num_balanced_batches(len(case["labels"]), case["batch_size"])}
    for step, batch in enumerate(whole):
        together = np.empty_like(batch)
        for rank in range(world_size):
            together[rank::world_size] = shares[rank][step]
        assert np.array_equal(together, batch)
        assert len({len(share[step]) for share in shares}) == 1


@given(balanced_cases())
def test_balanced_batches_hold_as_many_of_each_class(case: dict[str, Any]) -> None:
    del case["world_size"]
    labels, per_class = case["labels"], case["per_class"]
    sizes = {name: (labels == name).sum() for name in set(labels.tolist())}
    batches = balanced_batches(**case)
    for batch in batches:
        names, counts = np.unique(labels[batch], return_counts=True)
        assert len(names) == case["batch_size"] // per_class and (counts == per_class).all()
        for name in names.tolist():
            own = batch[labels[batch] == name]
            assert len(set(own.tolist())) == min(per_class, sizes[name])  # twice only where there are too few
    again = balanced_batches(**case)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


@given(balanced_cases())
def test_balanced_batches_take_classes_and_images_in_turn(case: dict[str, Any]) -> None:
    """No class comes a second time before all have come; nor does an image before all of its class have."""
    del case["world_size"]
    labels, per_class = case["labels"], case["per_class"]
    images = np.concatenate(balanced_batches(**case))
    turns = {name: (labels[images] == name).sum() // per_class for name in set(labels.tolist())}
    assert max(turns.values()) - min(turns.values()) <= 1
    for name in turns:
        members = np.flatnonzero(labels == name)
        counts = np.array([(images == member).sum() for member in members])
        assert counts.max() - counts.min() <= 1
        assert counts.sum() == turns[name] * per_class


def test_balanced_batches_depend_on_seed_and_epoch_alone() -> None:
    labels = np.arange(60) % 12

    def images(seed: int, epoch: int) -> list[int]:
        np.random.seed(seed + epoch)  # noqa: NPY002  (must not matter)
        return np.concatenate(balanced_batches(labels, 12, 3, seed=seed, epoch=epoch)).tolist()

    assert images(1, 0) == images(1, 0)
    assert images(1, 0) != images(1, 1) and images(1, 0) != images(2, 0) and images(1, 1) != images(2, 0)


def test_length_of_a_balanced_epoch() -> None:
    labels = np.arange(65) % 10
    for batch_size, expected in ((12, 5), (20, 3), (30, 2)):
        assert num_balanced_batches(65, batch_size) == expected
        assert len(balanced_batches(labels, batch_size, 2 if batch_size == 12 else 5, seed=0, epoch=0)) == expected
    assert num_balanced_batches(5, 12) == len(balanced_batches(np.array([0, 1, 2, 3, 4]), 12, 3, seed=0, epoch=0)) == 1


def test_all_images_come_equally_often_over_the_epochs() -> None:
    """Of classes of one size, an epoch is exactly one pass; classes of different size come equally often."""
    labels = np.repeat(np.arange(8), 6)
    images = np.concatenate([np.concatenate(balanced_batches(labels, 12, 3, seed=0, epoch=e)) for e in range(50)])
    assert np.bincount(images, minlength=48).tolist() == [50] * 48
    labels = np.repeat(np.arange(4), [2, 4, 20, 34])
    images = np.concatenate([np.concatenate(balanced_batches(labels, 8, 4, seed=0, epoch=e)) for e in range(200)])
    per_class = np.bincount(labels[images])
    assert per_class.min() > 0.95 * per_class.max()
    for name in range(4):
        counts = np.bincount(images, minlength=60)[labels == name]
        assert counts.min() > 0.5 * counts.max()  # chance; never left out


@pytest.mark.parametrize(("batch_size", "per_class"), [(10, 3), (12, 2), (2, 4)])
def test_balanced_batches_that_do_not_work_out(batch_size: int, per_class: int) -> None:
    with pytest.raises(ValueError, match=rf"batches of {batch_size} images, {per_class} a class.* than 5 classes"):
        balanced_batches(np.arange(20) % 5, batch_size, per_class, seed=0, epoch=0)
