"""Fitted affine maps: there and back, constants, and statistics that travel with the weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.model.normalizer import AffineNormalizer, Limits, Normalizer


def fitted(low, high):
    normalizer = Normalizer(np.shape(low))
    normalizer.fit(low, high)
    return normalizer


VALUES = st.floats(-1e6, 1e6, width=32)


@st.composite
def ranges(draw):
    """Limits of a few dimensions, each with a range that is a signal (over 1e-3 of its magnitude)."""
    low, high = [], []
    for _ in range(draw(st.integers(1, 4))):
        a = draw(VALUES)
        width = draw(st.floats(1e-3, 10)) * max(abs(a), 1e-3)
        low.append(a)
        high.append(a + width)
    return np.array(low), np.array(high)


@settings(deadline=None)
@given(limit=ranges(), fractions=st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=5))
def test_unnormalize_undoes_normalize_inside_and_outside_the_range(limit, fractions):
    low, high = limit
    normalizer = fitted(low, high)
    x = torch.tensor(np.stack([low + f * (high - low) for f in fractions]), dtype=torch.float32)
    normalized = normalizer.normalize(x)
    magnitude = torch.tensor(np.maximum(np.abs(low), np.abs(high)) + (high - low), dtype=torch.float32)
    # float32 holds about 7 digits of the larger of magnitude and range; the map costs a few units of the last.
    assert ((normalizer.unnormalize(normalized) - x).abs() <= 1e-6 * magnitude).all()
    expected = torch.tensor([[2 * f - 1] * len(low) for f in fractions])
    half_range = torch.tensor((high - low) / 2, dtype=torch.float32)
    assert ((normalized - expected).abs() <= 1e-6 * (1 + magnitude / half_range)).all()


@settings(deadline=None)
@given(limit=ranges(), seed=st.integers(0, 1000))
def test_normalize_undoes_unnormalize(limit, seed):
    normalizer = fitted(*limit)
    y = torch.rand(7, len(limit[0]), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    relative = torch.tensor(np.maximum(*map(np.abs, limit)) / (limit[1] - limit[0]), dtype=torch.float32)
    assert ((normalizer.normalize(normalizer.unnormalize(y)) - y).abs() <= 1e-6 * (1 + relative)).all()


def test_the_fitted_range_becomes_minus_1_to_1():
    low, high = [-2.0, 0.0, 10.0], [2.0, 5.0, 30.0]
    normalizer = fitted(low, high)
    ends = normalizer.normalize(torch.tensor([low, high]))
    assert torch.equal(ends, torch.tensor([[-1.0] * 3, [1.0] * 3]))
    middle = normalizer.normalize(torch.tensor([0.0, 2.5, 20.0]))
    assert torch.equal(middle, torch.zeros(3))


def test_dimensions_are_the_last_ones_whatever_stands_before():
    normalizer = fitted(np.zeros((2, 3)), np.full((2, 3), 4.0))
    x = 4 * torch.rand(5, 7, 2, 3)
    assert torch.equal(normalizer.normalize(x)[3, 4], normalizer.normalize(x[3, 4]))
    assert normalizer.normalize(x).shape == normalizer.unnormalize(x).shape == x.shape


@pytest.mark.parametrize(
    ("low", "high"),
    [(3.0, 3.0), (0.0, 0.0), (-1e5, -1e5), (1.0, 1.00005), (-1000.05, -1000.0), (1e-9, 1e-9), (300.0, 300.02)],
)
def test_constant_and_near_constant_dimensions_become_0_and_come_back_as_their_constant(low, high):
    normalizer = fitted([low, -1.0], [high, 1.0])
    # 100 stands for anything that was never seen in training.
    x = torch.tensor([[low, 0.5], [high, 0.5], [100.0, 0.5]])
    normalized = normalizer.normalize(x)
    assert torch.equal(normalized, torch.tensor([[0.0, 0.5]] * 3))
    for y in (-1.0, 0.0, 0.75, 1.0):
        back = normalizer.unnormalize(torch.tensor([y, y]))
        assert back[0].item() == pytest.approx((low + high) / 2, rel=1e-7)
        assert back[1].item() == y


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.001), (1.0, 1.00015), (-2.0, -1.9997), (0.0, 1e-9), (-1e-6, 1e-6), (300.0, 300.1)]
)
def test_small_ranges_that_are_a_signal_keep_it(low, high):
    normalizer = fitted([low], [high])
    ends = normalizer.normalize(torch.tensor([[low], [high]]))
    rounding = 2e-7 * max(abs(low), abs(high)) / (high - low)
    assert ends.flatten().tolist() == pytest.approx([-1, 1], abs=1e-6 + 2 * rounding)


def test_a_fresh_normalizer_leaves_values_as_they_are():
    x = torch.tensor([[3.0, -7.0]])
    assert torch.equal(Normalizer((2,)).normalize(x), x)
    assert torch.equal(Normalizer((2,)).unnormalize(x), x)


def test_the_statistics_are_saved_with_the_weights_and_are_not_trained():
    normalizer = fitted([0.0, 1.0], [2.0, 5.0])
    state = normalizer.state_dict()
    assert set(state) == {"center", "half_range"}
    assert list(normalizer.parameters()) == []
    other = Normalizer((2,))
    other.load_state_dict(state)
    x = torch.tensor([[0.5, 4.5]])
    assert torch.equal(other.normalize(x), normalizer.normalize(x))
    assert not torch.equal(other.normalize(x), x)


@pytest.mark.parametrize("missing", ["center", "half_range"])
def test_a_checkpoint_without_statistics_does_not_load(missing):
    state = fitted([0.0], [2.0]).state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        Normalizer((1,)).load_state_dict(state)


def test_statistics_of_another_width_do_not_load():
    with pytest.raises(RuntimeError, match="size mismatch for center"):
        Normalizer((2,)).load_state_dict(fitted([0.0], [2.0]).state_dict())


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ([0.0], [1.0], r"shape \(2,\); got \(1,\) and \(1,\)"),
        ([0.0, 0.0], [1.0], r"got \(2,\) and \(1,\)"),
        (0.0, 1.0, r"got \(\) and \(\)"),
        ([0.0, 2.0], [1.0, 1.0], "low <= high"),
        ([0.0, np.nan], [1.0, 1.0], "finite"),
        ([0.0, 0.0], [1.0, np.inf], "finite"),
    ],
)
def test_limits_that_are_none_are_refused(low, high, message):
    normalizer = Normalizer((2,))
    with pytest.raises(ValueError, match=message):
        normalizer.fit(low, high)
    assert torch.equal(normalizer.half_range, torch.ones(2))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_limits_are_the_extremes_of_each_dimension_over_all_blocks(dtype, cut):
    values = np.array([[1, 9], [5, 2], [3, 4]], dtype=dtype)
    limits = Limits()
    for block in (values[:cut], values[cut:]):
        if len(block):
            limits.update(block)
    low, high = limits
    assert low.dtype == high.dtype == np.float64
    assert low.tolist() == [1, 2]
    assert high.tolist() == [5, 9]


def test_a_nan_in_any_block_is_refused():
    limits = Limits()
    limits.update(np.array([[1.0], [np.nan]]))
    limits.update(np.array([[2.0]]))
    with pytest.raises(ValueError, match="holds a NaN or infinity"):
        Normalizer((1,)).fit(*limits)


@given(st.tuples(st.floats(-10, 10), st.floats(1e-2, 1e3)), st.floats(-3, 3))
def test_an_affine_normalizer_undoes_itself_without_a_bound(limit, share):
    low, size = limit
    affine = AffineNormalizer((1,))
    affine.fit([low], [low + size])
    x = torch.tensor([low + size * (0.5 + 10 * share)])
    torch.testing.assert_close(affine.normalize(x), torch.tensor([20 * share]), atol=2e-2, rtol=1e-3)
    torch.testing.assert_close(affine.unnormalize(affine.normalize(x)), x, atol=1e-4 * size + 1e-3, rtol=1e-4)


def test_the_inverse_of_each_normalizer_is_its_unnormalize():
    for made in (Normalizer((3,)), AffineNormalizer((3,))):
        made.fit([0.0, -4.0, 7.0], [2.0, 4.0, 7.0])
        x = torch.tensor([[0.5, -0.5, 0.25]])
        factor, shift = made.inverse()
        torch.testing.assert_close(x * factor + shift, made.unnormalize(x))
        assert made.unnormalize(x)[0].tolist() == [1.5, -2.0, 7.0]
        assert made.scale.tolist() == [1, 4, 1]
