"""Fused 2D features in a quarter of the bytes of float16, with an error that is bounded row by row.

What a row departs from the mean of its scene, or from zero where that is less than half as far, is divided by a step
that follows its own size, rounded to whole numbers, and these are Huffman coded. No distribution of given variance has
a larger entropy than the Gaussian, whose numbers take 2.05 - log2(0.29) = 3.83 bits each at this step: so much and a
few hundredths for Huffman's whole bits is the most that a number can take, in whatever directions the features point.
Nothing is learned, and nothing depends on features being few or alike.
"""

from typing import NamedTuple

import numpy as np
import zstandard
from jaxtyping import Float16, Int8, UInt8

STEP = 0.29  # of the root mean square of a row: an error of 0.29 / sqrt(12) = 0.084 of it
_LARGEST = 127  # int8
_FLOAT16_MAX = 65504
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(1, min_match=7)  # matches are left to rows that repeat


class FeatureCodes(NamedTuple):
    """Features [M, C] as `mean + steps * codes`; without the mean where a step is negative, zero where it is nan."""

    mean: Float16[np.ndarray, " C"]
    steps: Float16[np.ndarray, " M"]
    codes: Int8[np.ndarray, "M C"]

    def rows(self, chosen: np.ndarray) -> "FeatureCodes":
        """Those of some rows; they decode to what they did."""
        return FeatureCodes(self.mean, self.steps[chosen], self.codes[chosen])


def quantize(features: Float16[np.ndarray, "M C"]) -> FeatureCodes:
    """Codes from which `dequantize` restores each number to half a step of its row, and the rounding of float16.

    A step is `STEP` times the root mean square of what the row departs from the mean of all rows, or of the row itself
    where that is less than half of it, so that short rows keep their direction; more where the row has a number of more
    than 127 steps, which takes more than 1,300 channels. Rows of zeros, which say nothing, stay.
    """
    mean = (features.sum(axis=0, dtype=np.float32) / max(len(features), 1)).astype(np.float16)
    rows = features.astype(np.float32)
    departure = rows - mean.astype(np.float32)
    size, own_size = (np.sqrt(np.einsum("ij,ij->i", x, x) / features.shape[1]) for x in (departure, rows))
    short = 2 * own_size < size
    departure[short], size[short] = rows[short], own_size[short]
    largest = np.abs(departure).max(axis=1, initial=0)
    steps = np.maximum(STEP * size, largest / _LARGEST).astype(np.float16)
    divisor = np.where(steps > 0, steps, 1).astype(np.float32)
    codes = np.rint(departure / divisor[:, None]).clip(-_LARGEST, _LARGEST)
    nothing = ~features.any(axis=1)
    steps[short] *= -1
    steps[nothing], codes[nothing] = np.nan, 0
    return FeatureCodes(mean, steps, codes.astype(np.int8))


def dequantize(coded: FeatureCodes) -> Float16[np.ndarray, "M C"]:
    """The features that were coded, nearly; see `quantize`."""
    steps = coded.steps.astype(np.float32)[:, None]
    features = coded.codes * steps
    features += coded.mean.astype(np.float32)
    short = np.flatnonzero(np.signbit(coded.steps))
    features[short] = coded.codes[short] * -steps[short]
    features[np.isnan(coded.steps)] = 0
    return np.clip(features, -_FLOAT16_MAX, _FLOAT16_MAX, out=features).astype(np.float16)


def compress(codes: Int8[np.ndarray, "M C"]) -> UInt8[np.ndarray, " B"]:
    """The codes as a zstd frame, whose Huffman codes are read ten times as fast as those of zlib."""
    frame = zstandard.ZstdCompressor(compression_params=_PARAMETERS).compress(np.ascontiguousarray(codes))
    return np.frombuffer(frame, np.uint8)


def decompress(frame: UInt8[np.ndarray, " B"], channels: int) -> Int8[np.ndarray, "M C"]:
    """The codes [M, channels] of a frame."""
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.int8).reshape(-1, channels)
