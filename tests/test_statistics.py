"""Wilson's interval, votes and balanced subsets against brute force."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpt_cli.statistics import in_turn, vote, wilson


@given(st.integers(1, 400), st.data())
@settings(max_examples=60, deadline=None)
def test_wilson_is_where_the_score_test_turns(n, data):
    """The ends are the shares p at which |correct / n - p| is z standard errors of p, found by bisection."""
    correct, z = data.draw(st.integers(0, n)), 1.959964
    share = correct / n

    def end(inside, outside):
        for _ in range(60):
            p = (inside + outside) / 2
            if abs(share - p) <= z * np.sqrt(p * (1 - p) / n):
                inside = p
            else:
                outside = p
        return 100 * inside

    low, high = wilson(correct, n)
    assert low == pytest.approx(end(share, 0.0) if correct else 0.0, abs=1e-6)
    assert high == pytest.approx(end(share, 1.0) if correct < n else 100.0, abs=1e-6)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(2, 4), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_vote_is_the_mode_and_does_not_depend_on_the_batch(n_votes, n_images, n_classes, seed):
    rng = np.random.default_rng(seed)
    said, places = rng.integers(n_classes, size=(n_votes, n_images)), rng.integers(1000, size=n_images)
    chosen = vote(said, places, seed)
    for i in range(n_images):
        counts = Counter(said[:, i].tolist())
        assert counts[int(chosen[i])] == max(counts.values())
    assert [vote(said[:, [i]], places[[i]], seed)[0] for i in range(n_images)] == chosen.tolist()


def test_ties_are_broken_at_random():
    said = np.array([[3], [7]]).repeat(2000, axis=1)
    share = np.mean(vote(said, np.arange(2000)) == 3)
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(2000)
    assert set(vote(np.array([[0, 5], [4, 5], [4, 0], [0, 0], [9, 0]]), np.arange(2)).tolist()) <= {0, 4}
    assert (vote(said, np.arange(2000)) != vote(said, np.arange(2000), seed=1)).any()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_the_first_in_turn_are_balanced_as_far_as_classes_go(labels, seed):
    labels = np.array(labels)
    rows = np.flatnonzero(labels >= 0)
    order = in_turn(labels, rows, seed)
    assert sorted(order) == rows.tolist()
    in_all = np.bincount(labels, minlength=4)
    for n in range(len(order) + 1):
        taken = np.bincount(labels[order[:n]], minlength=4)
        for a in range(4):
            for b in range(4):
                if taken[a] < in_all[a]:  # a class that could give more has at most one less than any other
                    assert taken[b] <= taken[a] + 1
