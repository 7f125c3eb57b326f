"""The order of training examples, by worker and step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalenet_ray.training.schedule import Epochs, Pick


def _picked(epochs: Epochs, epoch: int) -> tuple[list[Pick], list[Pick | None]]:
    """All that an epoch's batches hold, of all workers: to train on, and to validate on."""
    first = epoch * epochs.steps
    picks = [
        [pick for step in steps for rank in range(epochs.workers) for pick in epochs.picks(step, rank)]
        for steps in (
            range(first, first + epochs.train_steps),
            range(first + epochs.train_steps, first + epochs.steps),
        )
    ]
    trained = [pick for pick in picks[0] if pick is not None]
    assert len(trained) == len(picks[0])
    return trained, picks[1]


sizes = st.builds(
    lambda share, workers, batches, rest, validation: Epochs(
        share * workers * batches + rest, validation, share * workers, workers, seed=3
    ),
    share=st.integers(1, 4),
    workers=st.integers(1, 4),
    batches=st.integers(1, 4),
    rest=st.integers(0, 20),
    validation=st.integers(0, 20),
)


@given(epochs=sizes, epoch=st.integers(0, 3))
def test_an_epoch_trains_on_each_example_at_most_once(epochs: Epochs, epoch: int) -> None:
    trained, _ = _picked(epochs, epoch)
    assert {pick.epoch for pick in trained} == {epoch}
    assert max(Counter(pick.example for pick in trained).values()) == 1
    assert {pick.example for pick in trained} <= set(range(epochs.train))
    # Only what does not fill a batch is left out.
    assert epochs.train - len(trained) < epochs.batch_size


@given(epochs=sizes, epoch=st.integers(0, 3))
def test_all_are_validated_on_exactly_once_and_blanks_fill_the_rest(epochs: Epochs, epoch: int) -> None:
    _, validated = _picked(epochs, epoch)
    seen = [pick for pick in validated if pick is not None]
    assert sorted(pick.example for pick in seen) == list(range(epochs.validation))
    assert {pick.epoch for pick in seen} <= {None}
    assert 0 <= len(validated) - len(seen) < epochs.batch_size


def test_each_epoch_has_an_order_of_its_own_and_each_seed() -> None:
    epochs = Epochs(32, 0, 8, 1, seed=0)
    orders = [epochs.order(0), epochs.order(1), Epochs(32, 0, 8, 1, seed=1).order(0)]
    for order in orders:
        assert sorted(order) == list(range(32))
    assert len({order.tobytes() for order in orders}) == 3
    np.testing.assert_array_equal(orders[0], epochs.order(0))


def test_the_batches_do_not_depend_on_how_many_workers_share_them() -> None:
    one, two = (Epochs(21, 6, 4, workers, seed=5) for workers in (1, 2))
    assert one.steps == two.steps == 7
    for step in range(3 * one.steps):
        assert two.picks(step, 0) + two.picks(step, 1) == one.picks(step, 0)


def test_a_set_smaller_than_a_batch_is_gone_through_more_than_once() -> None:
    epochs = Epochs(3, 0, 8, 2, seed=0)
    assert (epochs.train_steps, epochs.steps) == (1, 1)
    trained, _ = _picked(epochs, 0)
    assert len(trained) == 8
    assert sorted(Counter(pick.example for pick in trained).values()) == [2, 3, 3]


def test_nothing_to_train_on_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="at least one image, got 0: check the split and the limit"):
        Epochs(0, 5, 4, 1, seed=0)
