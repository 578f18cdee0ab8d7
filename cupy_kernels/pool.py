"""What the pooling operators share: the windows' shape rules, and the launch of the kernels that use pool.cuh."""

import functools
import math
from typing import NamedTuple

from .common import THREADS, ceil_div, row_width, same_shape, type_macros
from .launch import launch
from .source import Kernel

_LIMIT = 2**31
_MAX_BLOCKS_Y = 65535
_BATCHES = 8  # of a block's planes at least, so that the last one, partly filled, counts little
_ITEMS_2X2 = 4


class Pool(NamedTuple):
    """Windows of a pooling: pairs of ints, along H and along W."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def wide_taps(self) -> bool:
        """Whether taps, positions in the window, are int32, not uint8. The emulator's poison, 255, is none of them."""
        return math.prod(self.kernel_size) > 254


_TWO_BY_TWO = Pool((2, 2), (2, 2), (0, 0), (1, 1))


def pool_output_size(size, pool: Pool, ceil_mode: bool = False) -> tuple[int, int]:
    """(OH, OW) for planes of `size` (H, W). A window that ceil_mode adds must start in the plane or its left padding.

    RuntimeError, as torch raises it, for windows that make no sense or do not fit, or planes beyond 32-bit indices.
    """
    if min(*pool.kernel_size, *pool.stride, *pool.dilation) < 1:
        raise RuntimeError(f"kernel_size, stride and dilation must be positive, received {pool}")
    if any(not 0 <= p <= k // 2 for p, k in zip(pool.padding, pool.kernel_size)):
        raise RuntimeError(f"padding must be at least 0 and at most half of kernel_size, received {pool}")
    output = _windows(size, pool, ceil_mode)
    if min(output) < 1:
        raise RuntimeError(f"windows are larger than the padded planes: H, W = {tuple(size)}, {pool}")
    extents = [n + 2 * p + k * d + s for n, k, s, p, d in zip(size, *pool)]
    if max(*extents, math.prod(size), math.prod(output), math.prod(pool.kernel_size)) >= _LIMIT:
        raise RuntimeError(f"windows and planes must be below 2^31 elements, received H, W = {tuple(size)}, {pool}")
    return output


def _windows(size, pool, ceil_mode):
    output = []
    for n, k, s, p, d in zip(size, *pool):
        room = n + 2 * p - d * (k - 1) - 1
        count = (ceil_div(room, s) if ceil_mode else room // s) + 1
        output.append(count - 1 if ceil_mode and (count - 1) * s >= n + p else count)
    return tuple(output)


def launch_pool(name: str, file: str, args, pixels, windows, taps, pool: Pool, macros=(), backward=False) -> None:
    """Starts kernel(*args, planes, planes_per_block, sizes, windows), which walks by for_sites of pool.cuh.

    pixels: the arrays among args of the input's shape [..., H, W], at least one; windows: those of the output's shape.
    taps: one more of these, or None. macros: besides those of pool.cuh.
    backward: whether sites are pixels of the input, or else windows.
    """
    x, y = pixels[0], windows[0]
    same_shape(**{f"array {i} like the input": a for i, a in enumerate(pixels)})
    same_shape(**{f"array {i} like the output": a for i, a in enumerate((*windows, taps))})
    two_by_two = pool == _TWO_BY_TWO and row_width(x.shape[-1], *pixels) >= 2
    items = _ITEMS_2X2 if two_by_two else 1
    site = 2 if two_by_two else 1
    grid, sizes = _plan(x.shape, y.shape, pool, items * THREADS, site if backward else None)
    kernel = Kernel(
        file,
        name,
        (
            *type_macros(x),
            ("tap_t", "int" if pool.wide_taps else "u8"),
            ("WINDOW_2X2", int(two_by_two)),
            ("ITEMS", items),
            *macros,
        ),
    )
    launch(kernel, grid, (THREADS, 1, 1), (*args, *sizes))


@functools.lru_cache(maxsize=1024)
def _plan(shape, output_shape, pool, batch, site):
    """(grid, the kernels' last arguments). site: width of a site in pixels, None where sites are windows."""
    size, output, planes = shape[-2:], output_shape[-2:], math.prod(shape[:-2])
    pool_output_size(size, pool, ceil_mode=True)
    allowed = [_windows(size, pool, ceil_mode) for ceil_mode in (False, True)]
    if shape[:-2] != output_shape[:-2] or output not in allowed:
        raise ValueError(f"{pool} makes planes of {allowed} from {shape}, received {output_shape}")
    if planes >= _LIMIT:
        raise ValueError(f"there must be fewer than 2^31 planes, received {shape}")
    sites = math.prod(output) if site is None else ceil_div(size[0], site) * ceil_div(size[1], site)
    planes_per_block = min(max(planes, 1), ceil_div(_BATCHES * batch, sites))
    grid = (
        ceil_div(planes, planes_per_block),
        min(ceil_div(planes_per_block * sites, batch), _MAX_BLOCKS_Y),
        1,
    )
    return grid, (planes, planes_per_block, *size, *output, *(n for pair in pool for n in pair))
