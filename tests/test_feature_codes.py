"""Features in a quarter of the bytes: how small, how near, and what is left of a score."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.feature_codes import compress, decompress, dequantize, quantize

CHANNELS = (512, 768)  # LSeg's, OpenSeg's


def gaussian(rng, rows, channels):
    return rng.standard_normal((rows, channels))


def few_directions(rng, rows, channels):
    return rng.standard_normal((rows, 10)) @ rng.standard_normal((10, channels)) + 0.05 * gaussian(rng, rows, channels)


def outlying_channels(rng, rows, channels):
    """As CLIP's: two channels that dwarf the others, of which only the mean is the same everywhere."""
    features = gaussian(rng, rows, channels)
    features[:, [7, 133]] = rng.normal([80, -50], 20, (rows, 2))
    return features


def uniform(rng, rows, channels):
    return rng.random((rows, channels))


def two_values(rng, rows, channels):
    return rng.integers(0, 2, (rows, channels))


def single_spikes(rng, rows, channels):
    return np.eye(channels)[rng.integers(0, channels, rows)]


KINDS = [gaussian, few_directions, outlying_channels, uniform, two_values, single_spikes]


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_features_of_any_kind_take_at_most_a_quarter_of_float16(kind, channels):
    features = kind(np.random.default_rng(0), 3000, channels).astype(np.float16)
    coded = quantize(features)
    size = compress(coded.codes).nbytes + coded.steps.nbytes + coded.mean.nbytes
    index = 4 * len(features) / 2  # what zlib leaves of the int32 of feature_index, at most
    assert size + index <= 0.25 * features.nbytes


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(0, 30),
    channels=st.integers(1, 40),
    size=st.sampled_from([1e-4, 0.01, 1, 100, 60_000]),
    offset=st.sampled_from([0, 1]),
    seed=st.integers(0, 10_000),
)
def test_every_number_comes_back_to_half_a_step_of_its_row(rows, channels, size, offset, seed):
    rng = np.random.default_rng(seed)
    features = np.clip(size * (offset + rng.standard_normal((rows, channels)) ** 3), -65504, 65504).astype(np.float16)
    coded = quantize(features)
    decoded = dequantize(coded)
    assert decoded.dtype == np.float16 and np.isfinite(decoded).all()
    exact = features.astype(np.float64)
    step = np.maximum(0.29 * np.sqrt(((exact - coded.mean) ** 2).mean(axis=1)), np.abs(exact - coded.mean).max(1) / 127)
    rounding = np.maximum(2.0**-10 * np.maximum(np.abs(exact), np.abs(decoded)), 2.0**-23)
    assert (np.abs(decoded - exact) <= 0.501 * step[:, None] + rounding).all()
    np.testing.assert_array_equal(decompress(compress(coded.codes), channels), coded.codes)


def test_rows_of_any_length_keep_their_direction():
    """L_p and the scores look at nothing else."""
    rng = np.random.default_rng(0)
    features = (1 + 0.3 * gaussian(rng, 2000, 512)) * rng.choice([1e-3, 0.1, 1, 100], (2000, 1))
    exact = features.astype(np.float16).astype(np.float64)
    decoded = dequantize(quantize(features.astype(np.float16))).astype(np.float64)
    cosine = (exact * decoded).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(decoded, axis=1)
    assert cosine.min() > 0.98


def test_equal_rows_and_rows_of_zeros_come_back_as_they_are():
    features = np.full((5, 8), 0.3, np.float16)
    np.testing.assert_array_equal(dequantize(quantize(features)), features)
    np.testing.assert_array_equal(dequantize(quantize(0 * features)), 0 * features)


def test_rows_of_zeros_among_others_stay_zero():
    features = np.random.default_rng(0).normal(0.1, 1, (300, 64)).astype(np.float16)
    features[::7] = 0
    decoded = dequantize(quantize(features))
    np.testing.assert_array_equal(decoded.any(axis=1), features.any(axis=1))


def test_some_rows_decode_to_what_they_do_among_all():
    features = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float16)
    chosen = np.arange(50) % 3 == 0
    coded = quantize(features)
    np.testing.assert_array_equal(dequantize(coded.rows(chosen)), dequantize(coded)[chosen])


@pytest.mark.parametrize("channels", CHANNELS)
def test_means_of_many_rows_lose_less_than_the_rows(channels):
    """What training draws from superpoints and from many visits: errors do not add up."""
    rng = np.random.default_rng(0)
    centre = rng.standard_normal(channels)
    features = (centre + rng.standard_normal((2000, channels))).astype(np.float16)
    error = (dequantize(quantize(features)).astype(np.float64) - features).mean(axis=0)
    assert np.linalg.norm(error) < 0.005 * np.linalg.norm(centre)
