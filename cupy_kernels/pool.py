"""Shared code of the pooling operators: the shape rules of windows, and launches of the kernels that use pool.cuh."""

import functools
import math
from typing import NamedTuple

from .common import FLOATS, THREADS, ceil_div, row_width, same_shape, scalar, scalar_macros
from .launch import launch
from .source import Kernel, Variant

_LIMIT = 2**31
_MAX_PLANES = 2**30
MAX_BLOCKS_Y = 65535
_ITEMS_2X2, _ITEMS_3X3 = 4, 2  # planes of a thread
_PLACES = 2048  # the fewest of a block: its last round, with fewer places than threads, then counts little
_ROUNDS = 4  # of a block, if there are many blocks: what it computes once then counts little
_MANY_BLOCKS = 4096


class Pool(NamedTuple):
    """Windows of a pooling: pairs of ints, along H and along W."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def wide_argmax(self) -> bool:
        """Whether argmax is int32, not uint8. In uint8, 255 is reserved: the emulator fills memory with it."""
        return math.prod(self.kernel_size) > 254


_TWO_BY_TWO = Pool((2, 2), (2, 2), (0, 0), (1, 1))
_THREE_BY_THREE = tuple(Pool((3, 3), (stride, stride), (0, 0), (1, 1)) for stride in (1, 2))


def pool_output_size(size, pool: Pool, ceil_mode: bool = False) -> tuple[int, int]:
    """(OH, OW) for planes of `size` (H, W). A window that ceil_mode adds must start in the plane or its left padding.

    size: ints, or symbols of torch.export. H and W are not compared, which would tie them to each other there.

    Raises RuntimeError, as PyTorch does, for invalid windows, windows that do not fit, and planes beyond 32-bit
    indices (of symbols, when the kernels run).
    """
    if min(*pool.kernel_size, *pool.stride, *pool.dilation) < 1:
        raise RuntimeError(f"kernel_size, stride and dilation must be positive, received {pool}")
    if any(not 0 <= p <= k // 2 for p, k in zip(pool.padding, pool.kernel_size)):
        raise RuntimeError(f"padding must be at least 0 and at most half of kernel_size, received {pool}")
    output = _windows(size, pool, ceil_mode)
    if any(n < 1 for n in output):
        raise RuntimeError(f"windows are larger than the padded planes: H, W = {tuple(size)}, {pool}")
    extents = [n + 2 * p + k * d + s for n, k, s, p, d in zip(size, *pool)]
    counts = *extents, math.prod(size), math.prod(output), math.prod(pool.kernel_size)
    if any(isinstance(n, int) and n >= _LIMIT for n in counts):
        raise RuntimeError(f"windows and planes must be below 2^31 elements, received H, W = {tuple(size)}, {pool}")
    return output


def _windows(size, pool, ceil_mode):
    output = []
    for n, k, s, p, d in zip(size, *pool):
        room = n + 2 * p - d * (k - 1) - 1
        count = (ceil_div(room, s) if ceil_mode else room // s) + 1
        output.append(count - 1 if ceil_mode and (count - 1) * s >= n + p else count)
    return tuple(output)


def pool_kernel(
    file: str, name: str, pixels, windows, argmax, pool: Pool, macros=(), three_by_three: bool = False
) -> Kernel:
    """The variant of a kernel for these arrays. Raises ValueError if the shapes do not match `pool`.

    pixels: arrays of the input's shape [..., H, W], at least one.
    windows: arrays of the output's shape, at least one.
    argmax: one more array of the output's shape, or None.
    macros: further ones, besides those of pool.cuh.
    three_by_three: whether the file has variants for 3x3 windows, with any padding.
    """
    x, y = pixels[0], windows[0]
    same_shape(**{f"array {i} like the input": a for i, a in enumerate(pixels)})
    same_shape(**{f"array {i} like the output": a for i, a in enumerate((*windows, argmax))})
    check_pool_shapes(x.shape, y.shape, pool)
    two_by_two = pool == _TWO_BY_TWO and row_width(x.shape[-1], *pixels) >= 2
    fixed = pool.stride[0] if three_by_three and pool._replace(padding=(0, 0)) in _THREE_BY_THREE else 0
    return Kernel(file, name, _defines(scalar(x), pool.wide_argmax, two_by_two, fixed, macros))


def pool_variants(file: str, macros=(), three_by_three: bool = False):
    """Every variant that `pool_kernel` can return for a file."""
    for name in FLOATS:
        for wide_argmax, two_by_two in ((False, True), (False, False), (True, False)):
            yield Variant(file, _defines(name, wide_argmax, two_by_two, 0, macros))
        for pool in _THREE_BY_THREE if three_by_three else ():
            yield Variant(file, _defines(name, False, False, pool.stride[0], macros))


def argmax_type(wide_argmax: bool) -> str:
    """The kernels' name of argmax's type."""
    return "int" if wide_argmax else "u8"


def _defines(name, wide_argmax, two_by_two, three_by_three, macros):
    return (
        *scalar_macros(name),
        ("argmax_t", argmax_type(wide_argmax)),
        ("WINDOW_2X2", int(two_by_two)),
        ("WINDOW_3X3", three_by_three),
        ("SITE", 2 if two_by_two else 1),
        ("ITEMS", _ITEMS_2X2 if two_by_two else _ITEMS_3X3 if three_by_three else 1),
        ("THREADS", THREADS),
        *macros,
    )


@functools.lru_cache(maxsize=1024)
def check_pool_shapes(shape, output_shape, pool: Pool) -> None:
    """Raises ValueError unless `pool` maps shape to output_shape, both [..., H, W], with or without ceil_mode."""
    pool_output_size(shape[-2:], pool, ceil_mode=True)
    allowed = [(*shape[:-2], *_windows(shape[-2:], pool, ceil_mode)) for ceil_mode in (False, True)]
    if output_shape not in allowed:
        raise ValueError(f"{pool} makes {allowed[0]} or {allowed[1]} from {shape}, received {output_shape}")
    if math.prod(shape[:-2]) >= _MAX_PLANES:
        raise ValueError(f"there must be fewer than 2^30 planes, received {shape}")


def launch_windows(kernel: Kernel, args, x, y, pool: Pool, channels: int = 1) -> None:
    """Starts a kernel over windows, with arguments (*args, planes, period, planes_per_block, sizes, windows).

    x, y: arrays of the input's and the output's shape.
    channels: a divisor of the period.
    """
    _launch(kernel, math.prod(y.shape[-2:]), args, x, y, pool, channels)


def launch_pixels(kernel: Kernel, args, x, y, pool: Pool, channels: int = 1) -> None:
    """`launch_windows` for a kernel over the pixels of the input."""
    site = dict(kernel.defines)["SITE"]
    _launch(kernel, math.prod(ceil_div(n, site) for n in x.shape[-2:]), args, x, y, pool, channels)


def _launch(kernel, places, args, x, y, pool, channels):
    planes = math.prod(x.shape[:-2])
    period = pool_period(kernel, planes // channels) * channels
    planes_per_block = min(max(period, 1), ceil_div(_PLACES, places))
    blocks = ceil_div(planes_per_block * places, THREADS)
    grid_x = ceil_div(period, planes_per_block)
    if grid_x * blocks >= _MANY_BLOCKS:
        blocks = ceil_div(blocks, _ROUNDS)
    sizes = (planes, period, planes_per_block, *pool_geometry(x, y, pool))
    launch(kernel, (grid_x, min(blocks, MAX_BLOCKS_Y), 1), (THREADS, 1, 1), (*args, *sizes))


def pool_period(kernel: Kernel, planes: int) -> int:
    """The distance between a thread's planes, out of `planes`."""
    return ceil_div(planes, dict(kernel.defines)["ITEMS"])


def pool_geometry(x, y, pool: Pool) -> tuple[int, ...]:
    """The last 12 arguments of every kernel: sizes of input and output planes, and the windows."""
    return (*x.shape[-2:], *y.shape[-2:], *(n for pair in pool for n in pair))
