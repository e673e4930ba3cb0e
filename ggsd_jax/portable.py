"""A network as one XLA program from voxels to features, for use without this code.

On the host, kernel maps are made by numba (`kernels.voxel_grid`). Here XLA makes them itself, so that the program
needs nothing but the voxels: sort the packed keys, and look up every neighbour by bisection. It computes what
`inference.encode_voxels` does, a few times slower, since it multiplies by missing neighbours too.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from jaxtyping import Array, Float, Int

from ggsd_jax.minkunet import MinkUNet
from kernels.voxel_grid import KernelMap, Pyramid, build_pyramid

PLATFORMS = ("cpu", "cuda", "tpu")
EXTENT_LIMIT = (1 << 20) - 32
"""Voxels along each axis that a cloud may span."""
_BITS = 21  # of each axis in a packed key
_TILE = 1024  # pairs
_NOWHERE = np.iinfo(np.int64).max  # key of a padding row: sorts last


def serialize(model: MinkUNet, variables: Mapping[str, Any], bucket: int) -> bytes:
    """The network as a `jax.export` program of up to `bucket` voxels (a multiple of 128), without its weights.

    `jax.export.deserialize(...).call(variables, coords, num_voxels, feats)` takes
        variables: dict from "params/conv0p1s1/kernel" and so on to float32 arrays, as `flat` gives them;
        coords: int32 [bucket, 3], distinct voxels `floor(point / voxel_size)`; rows from num_voxels on are ignored;
        num_voxels: int32 [];
        feats: float32 [bucket, Cin], the network's input (ones [bucket, 3] where it does not read colours)
    and returns features float32 [bucket, C]: zero from row num_voxels on; NaN if the cloud has more coarse voxels than
    the bucket has room for (take the next one) or spans more than `EXTENT_LIMIT` voxels.

    Raises:
        ValueError: bucket is no positive multiple of 128.
    """
    if bucket <= 0 or bucket % 128:
        raise ValueError(f"bucket is {bucket}: expected a positive multiple of 128")
    in_channels = variables["params"]["conv0p1s1"]["kernel"].shape[-2]
    shapes = (
        {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat(variables).items()},
        jax.ShapeDtypeStruct((bucket, 3), np.int32),
        jax.ShapeDtypeStruct((), np.int32),
        jax.ShapeDtypeStruct((bucket, in_channels), np.float32),
    )
    with jax.enable_x64(True):  # packed keys have 63 bits
        program = export.export(jax.jit(functools.partial(_features, model)), platforms=PLATFORMS)(*shapes)
        return bytes(program.serialize())


def flat(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Variables by name, float32: "params/conv0p1s1/kernel", ..."""
    return {name: np.asarray(leaf, np.float32) for name, leaf in flatten_dict(dict(variables), sep="/").items()}


def _features(
    model: MinkUNet,
    variables: dict,
    coords: Int[Array, "V 3"],
    num_voxels: Int[Array, ""],
    feats: Float[Array, "V Cin"],
) -> Float[Array, "V C"]:
    pyramid, fits = _pyramid(coords, num_voxels)
    feats = jnp.where(jnp.arange(len(feats))[:, None] < num_voxels, feats, 0)
    model = model.clone(implementation="xla")  # the only one that runs on every platform
    features = model.apply(unflatten_dict(variables, sep="/"), feats, pyramid, train=False)
    return jnp.where(fits, features, jnp.nan)


class _Level(NamedTuple):
    """Voxels of a level in units of its tensor stride."""

    keys: Any  # int64 [V], ascending, _NOWHERE at the end
    rows: Any  # int32 [V], the row of each


def _pyramid(coords: Int[Array, "V 3"], num_voxels: Int[Array, ""]) -> tuple[Pyramid, Any]:
    """The pyramid of `coords` in the shapes of its bucket, and whether all levels fit."""
    bucket = coords.shape[0]
    shapes = build_pyramid(np.zeros((1, 4), np.int32), bucket=bucket).coords
    there = jnp.arange(bucket) < num_voxels
    stride = 1 << (len(shapes) - 1)  # of the coarsest level: moved by a multiple, voxels keep their parents
    lowest = jnp.where(there[:, None], coords, np.iinfo(np.int32).max).min(axis=0) // stride * stride
    coords = coords - lowest  # where the difference overflows it is negative
    spans = ((coords >= 0) & (coords < EXTENT_LIMIT)).all(axis=1) | ~there
    keys = jnp.where(there, _pack(coords), _NOWHERE)
    order = jnp.argsort(keys).astype(jnp.int32)
    level = _Level(keys[order], order)
    sizes, submanifold, down, fits = [num_voxels], [_neighbours(level, 3)], [], spans.all() & (num_voxels <= bucket)
    stem = _neighbours(level, 5)
    for capacity in (c.shape[0] for c in shapes[1:]):
        coarse, size = _coarsen(level, capacity)
        down.append(_children(level, coarse))
        submanifold.append(_neighbours(coarse, 3))
        sizes.append(size)
        fits &= size <= capacity
        level = coarse
    empty = tuple(jnp.zeros(c.shape, jnp.int32) for c in shapes)  # a network reads their shapes only
    return Pyramid(empty, jnp.stack(sizes), stem, tuple(submanifold), tuple(down)), fits


def _pack(coords: Int[Array, "V 3"]) -> Int[Array, " V"]:
    key = jnp.zeros(len(coords), jnp.int64)
    for axis in range(3):
        key = (key << _BITS) + (coords[:, axis] + (1 << (_BITS - 1)))
    return key


def _unpack(keys: Int[Array, " V"]) -> Int[Array, "V 3"]:
    axes = [(keys >> (shift * _BITS)) & ((1 << _BITS) - 1) for shift in (2, 1, 0)]
    return jnp.stack(axes, axis=1) - (1 << (_BITS - 1))


def _shift(offset: tuple[int, int, int]) -> int:
    """Difference of the keys of two voxels, from that of their coordinates."""
    return (offset[0] << (2 * _BITS)) + (offset[1] << _BITS) + offset[2]


def _look_up(level: _Level, keys: Int[Array, " M"]) -> tuple[Int[Array, " M"], Any]:
    """Rows of the voxels with these keys, and whether there are such."""
    at = jnp.minimum(jnp.searchsorted(level.keys, keys), len(level.keys) - 1)
    return level.rows[at], (level.keys[at] == keys) & (keys != _NOWHERE)


def _neighbours(level: _Level, kernel_size: int) -> KernelMap:
    reach = range(-(kernel_size // 2), kernel_size // 2 + 1)
    offsets = jnp.array([_shift((x, y, z)) for z in reach for y in reach for x in reach], jnp.int64)
    wanted = jnp.where(level.keys == _NOWHERE, _NOWHERE, level.keys + offsets[:, None])
    return _kernel_map(level, level, wanted)


def _coarsen(level: _Level, capacity: int) -> tuple[_Level, Any]:
    """The level of twice the stride, its rows in the order of its keys, and how many voxels it would have."""
    parents = jnp.where(level.keys == _NOWHERE, _NOWHERE, _pack(_unpack(level.keys) >> 1))
    parents = jnp.sort(parents)
    new = (parents != _NOWHERE) & (parents != jnp.roll(parents, 1)).at[0].set(True)
    keys = jnp.sort(jnp.where(new, parents, _NOWHERE))
    keys = jnp.pad(keys, (0, max(0, capacity - len(keys))), constant_values=_NOWHERE)[:capacity]
    return _Level(keys, jnp.arange(capacity, dtype=jnp.int32)), new.sum(dtype=jnp.int32)


def _children(level: _Level, coarse: _Level) -> KernelMap:
    first = _pack(_unpack(coarse.keys) * 2)
    offsets = jnp.array([_shift((x, y, z)) for z in (0, 1) for y in (0, 1) for x in (0, 1)], jnp.int64)
    return _kernel_map(level, coarse, jnp.where(coarse.keys == _NOWHERE, _NOWHERE, first + offsets[:, None]))


def _kernel_map(source: _Level, target: _Level, wanted: Int[Array, "K M"]) -> KernelMap:
    """Pairs of every target row with the source voxel whose key is wanted under each offset, if there is one."""
    num_in, num_out, volume = len(source.keys), len(target.keys), len(wanted)
    rows, there = jax.lax.map(functools.partial(_look_up, source), wanted)
    extra = ((0, 0), (0, -num_out % _TILE))
    in_index = jnp.pad(jnp.where(there, rows, num_in), extra, constant_values=num_in)
    out_index = jnp.pad(jnp.where(there, target.rows, num_out), extra, constant_values=num_out)
    tiles = in_index.size // _TILE
    offset_index = jnp.repeat(jnp.arange(volume, dtype=jnp.int32), tiles // volume)
    in_index, out_index = (x.reshape(tiles, _TILE).astype(jnp.int32) for x in (in_index, out_index))
    return KernelMap(in_index, out_index, offset_index, jnp.int32(tiles), num_in, num_out, volume)
