"""Sparse convolution over a kernel map: one public function, several implementations of it."""

from kernels.sparse_conv.api import sparse_conv
from kernels.sparse_conv.epilogue import Epilogue

__all__ = ["Epilogue", "sparse_conv"]
