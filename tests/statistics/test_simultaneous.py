"""Intervals of the differences to the best cell that hold for all cells together."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from policy.statistics.counts import pair_counts
from policy.statistics.paired import compare_success
from policy.statistics.simultaneous import compare_means_with_best, compare_with_best


def equal_cells(cells, episodes, seed, rate=0.9):
    return np.random.default_rng(seed).random((cells, episodes)) < rate


def test_two_cells_are_compared_as_a_pair_and_more_cells_with_wider_intervals():
    success = equal_cells(6, 300, 0)
    best = int(success.mean(1).argmax())
    widths = []
    for count in (2, 4, 6):
        chosen = [best, *[cell for cell in range(6) if cell != best][: count - 1]]
        together = compare_with_best(success[chosen], 0)
        alone = compare_success(success[chosen], 0)
        assert (together[0].low, together[0].high, together[0].p_value) == (0, 0, 1)
        for wide, narrow in zip(together[1:], alone[1:], strict=True):
            assert wide.low <= narrow.low <= narrow.difference <= narrow.high <= wide.high
            assert (wide.difference, wide.adjusted_p_value) == (narrow.difference, narrow.adjusted_p_value)
        widths.append(together[1].high - together[1].low)
    assert widths == sorted(widths)
    assert compare_with_best(success, best) == compare_with_best(success, best)


def false_differences(cells, repeats, compare):
    """How often some interval of truly equal cells excludes 0."""
    found = 0
    for seed in range(repeats):
        success = equal_cells(cells, 200, seed)
        best = int(success.mean(1).argmax())
        found += any(cell.low > 0 or cell.high < 0 for cell in compare(success, best))
    return found / repeats


def test_truly_equal_cells_seldom_differ_from_the_best():
    assert false_differences(6, 40, compare_with_best) <= 0.05 + 3 * (0.05 * 0.95 / 40) ** 0.5
    assert false_differences(6, 40, compare_success) > 0.15  # the reason for simultaneous intervals


@pytest.mark.slow
@pytest.mark.parametrize("cells", [6, 48])
def test_truly_equal_cells_seldom_differ_from_the_best_in_larger_sweeps(cells):
    assert false_differences(cells, 400, compare_with_best) <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


def test_cells_are_compared_on_the_episodes_that_both_ran():
    success = [row[:count] for row, count in zip(equal_cells(3, 200, 3), (50, 120, 200), strict=True)]
    wins, episodes = pair_counts(success, paired=True)
    assert episodes.tolist() == [[50, 50, 50], [50, 120, 120], [50, 120, 200]]
    assert wins[0, 1] == np.sum(success[0] & ~success[1][:50])
    assert wins[1, 0] == np.sum(success[1][:50] & ~success[0])
    short = compare_with_best([success[0], success[2][:50]], 1)[0]
    found = compare_with_best(success, 2)[0]
    assert found.difference == short.difference
    assert found.low <= found.difference <= found.high
    with pytest.raises(ValueError, match="same episodes in every cell"):
        compare_with_best(success, 2, paired=False)


def test_unpaired_cells_ignore_the_order_and_one_cell_has_no_other():
    success = equal_cells(3, 100, 1)
    assert compare_with_best(success, 0, paired=False) == compare_with_best(success[:, ::-1], 0, paired=False)
    assert len(compare_with_best(success[:1], 0)) == 1
    with pytest.raises(ValueError, match="one or more cells"):
        compare_with_best([], 0)


def test_two_means_have_the_interval_of_a_paired_t_test():
    values = np.random.default_rng(0).normal(size=(2, 7))
    best = int(values.mean(1).argmin())
    other = 1 - best
    expected = ttest_rel(values[other], values[best]).confidence_interval(0.95)
    found = compare_means_with_best(values, best)
    assert found[best] == (0, 0, 0)
    assert found[other][1:] == pytest.approx((expected.low, expected.high))
    with pytest.raises(ValueError, match="two episodes or more; got 1"):
        compare_means_with_best(values[:, :1], best)


@pytest.mark.parametrize("episodes", [4, 20])
def test_the_differences_from_the_least_of_equal_means_are_covered_together(episodes):
    generator = np.random.default_rng(1)
    covered = []
    for _ in range(400):
        values = generator.normal(size=(5, episodes)) + generator.normal(size=episodes)
        found = compare_means_with_best(values, int(values.mean(1).argmin()))
        covered.append(all(low <= 0 for _, low, _ in found))
    assert np.mean(covered) > 0.93
