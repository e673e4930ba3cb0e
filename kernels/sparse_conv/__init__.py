"""Sparse convolution over a kernel map: one public function, several implementations of it."""

from kernels.sparse_conv.api import sparse_conv

__all__ = ["sparse_conv"]
