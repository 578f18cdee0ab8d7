"""2D transposed convolution on tensor cores for any hyper-parameters, channels and sizes: forward, dgrad and wgrad.

Shapes are as in `conv_transpose`. Each product is an implicit GEMM of pixels by channels. It gathers from operands that
are packed with channels innermost. float32 operands become fp16, scaled by powers of two: split 1 has TF32's precision,
split 2 float32's. 16-bit operands stay as they are. A 16-bit channels_last tensor with a multiple of 8 channels per
group needs no packing.

channels_last: whether tensors are [N, H, W, C] arrays, in and out, instead of [N, C, H, W].
"""

import math

import numpy as np

from .common import MULTIPROCESSORS, THREADS, address, ceil_div, row_width, scalar
from .conv_transpose import logical
from .conv_wgmma import architecture
from .gather_gemm_plan import (
    GATHER,
    GATHER_SM75,
    WGMMA,
    WGRAD,
    WGRAD_SM75,
    Plan,
    WgradPlan,
    octets,
    pack_macros,
)
from .launch import MAX_THREADS, launch
from .source import Kernel, Variant

_LONG_COLUMN = 4096  # weights of a channel from which on a block that reads them has all threads


def operand_dtype(name: str) -> np.dtype:
    """dtype of the packed operands of tensors of this type."""
    return np.dtype(np.int16 if name == "bf16_t" else np.float16)


def packed_size(shape, groups: int, split: int) -> int:
    """Elements of a packed tensor [N, C, H, W] of this shape."""
    return shape[0] * math.prod(shape[2:]) * split * groups * octets(shape[1] // groups) * 8


def is_packed(shape, groups: int, dtype: str, channels_last: bool) -> bool:
    """Whether kernels can read the tensor itself, if it starts at a multiple of 16 bytes."""
    return dtype != "float" and channels_last and shape[1] // groups % 8 == 0


def pack_pixels(source, exponents, packed, split: int, groups: int, channels_last: bool) -> None:
    """Writes `packed`. exponents: of `fp16_tiles.largest_magnitude` for a float32 tensor that has these images."""
    name = scalar(source)
    images, channels, *size = logical(source.shape, channels_last)
    pixels, group_octets = math.prod(size), octets(channels // groups)
    # One octet with its residual would need all of the 48 KiB that a block has without asking.
    wide = row_width(pixels, source) >= 4 and (groups * group_octets, split) != (1, 2)
    width = 4 if not channels_last and wide else 1
    macros = pack_macros(name, split, width)
    args = source, exponents, packed, 0 if exponents is None else exponents.size
    args += images, groups, channels // groups, group_octets, pixels
    if channels_last:
        grid = ceil_div(images * pixels * groups * group_octets, THREADS), 1, 1
        launch(Kernel("gather_gemm_pack.cu", "pack_rows", macros), grid, (THREADS, 1, 1), args)
    else:
        block_octets = min(groups * group_octets, 32)
        block_pixels = THREADS // block_octets * width
        grid = ceil_div(groups * group_octets, block_octets) * ceil_div(images * pixels, block_pixels), 1, 1
        shared_bytes = block_pixels * (block_octets * split | 1) * 16
        kernel = Kernel("gather_gemm_pack.cu", "pack_planes", macros)
        launch(kernel, grid, (THREADS, 1, 1), (*args, block_octets), shared_bytes)


def gather(
    p: Plan, source, source_exponents, w, bias, out, packed, exponents, partial, channels_last, w_channels_last
) -> None:
    """Writes `out`, the result of the forward or of dgrad, from the packed `source`.

    w: [Cin, Cout/groups, KH, KW], or with w_channels_last [Cin, KH, KW, Cout/groups].
    bias, partial: may be None.
    packed, exponents, partial: workspaces, written: p.packed_size elements; p.columns elements, int32, for float32
        tensors only; p.partial_size elements, float32.
    """
    _pack_taps(p, w, packed, exponents, w_channels_last)
    count = 0 if source_exponents is None else source_exponents.size
    shared_bytes, block, split = dict(p.macros)["SHARED_BYTES"], (p.tile.threads, 1, 1), p.splits > 1
    args = (count, *p.args, int(channels_last))
    launch(
        _variant("gather_gemm.cu", p.macros).kernel("gather_gemm"),
        (*p.grid[:2], p.splits),
        block,
        (
            source,
            source_exponents,
            packed,
            exponents,
            bias,
            None if split else out,
            partial if split else None,
            *args,
            p.split_steps,
        ),
        shared_bytes,
    )
    if split:
        arrays = partial, source_exponents, exponents, bias, out
        kernel = _variant("gather_gemm.cu", p.macros).kernel("gather_gemm_reduce")
        launch(kernel, p.grid, block, (*arrays, *args, p.splits), shared_bytes)


def turn_rows(source, target) -> None:
    """Writes target, [N, C, H, W], from source, [N, H, W, C]."""
    images, channels, *size = target.shape
    blocks = ceil_div(channels, 32) * ceil_div(math.prod(size), 64) * images
    kernel = Kernel("gather_gemm_pack.cu", "turn_rows", pack_macros(scalar(source), 1, 1))
    launch(kernel, (blocks, 1, 1), (THREADS, 1, 1), (source, target, channels, math.prod(size)))


def _pack_taps(p, w, packed, exponents, channels_last):
    groups, columns = p.grid[1], p.columns // p.grid[1]
    in_stride, out_stride, tap_stride = weight_strides(w.shape, channels_last)
    strides = (in_stride, out_stride) if p.dgrad else (out_stride, in_stride)
    tile_n, channels, sum_channels, sum_octets, kernel_h, kernel_w, _, _, merged_h, merged_w, *_ = p.pack_args
    taps, group_stride = kernel_h * kernel_w, w.shape[0] // groups * in_stride
    alone = exponents is None and merged_h * merged_w == 1 and tap_stride == 1
    neighbours = taps if strides[0] != taps else taps * channels  # in memory
    if alone and not any(n % 8 for n in (neighbours, strides[1], group_stride, address(w) // w.itemsize)):
        kernel = Kernel("gather_gemm_pack.cu", "turn_taps", p.pack_macros)
        grid = ceil_div(sum_octets, 8) * ceil_div(columns * taps, 256), groups, 1
        args = w, packed, channels, sum_channels, sum_octets, taps, group_stride, *strides, columns
        launch(kernel, grid, (THREADS, 1, 1), args)
        return
    args = (*p.pack_args, group_stride, *strides, tap_stride, columns)
    if exponents is not None:
        channels = columns // tile_n * (tile_n // (merged_h * merged_w))
        blocks = ceil_div(channels, 32) if strides[0] == 1 else channels
        threads = MAX_THREADS if sum_channels * kernel_h * kernel_w >= _LONG_COLUMN else THREADS
        kernel = Kernel("gather_gemm_pack.cu", "tap_exponents", p.pack_macros)
        launch(kernel, (blocks, groups, 1), (threads, 1, 1), (w, exponents, *args))
    kernel, octet_count = Kernel("gather_gemm_pack.cu", "pack_taps", p.pack_macros), p.packed_octets
    grid = ceil_div(octet_count, THREADS), groups, 1
    launch(kernel, grid, (THREADS, 1, 1), (w, exponents, packed, *args, int(not p.dgrad)))


def weight_strides(shape, channels_last) -> tuple[int, int, int]:
    """Strides of input channels, output channels and taps, in elements."""
    all_of_one = math.prod(shape[1:])
    return (all_of_one, 1, shape[3]) if channels_last else (all_of_one, shape[2] * shape[3], 1)


def wgrad_sums(p: WgradPlan, x, dy, partial) -> None:
    """Writes `partial`, float32, p.partial_size elements: sums of the gradient of w, from packed x and dy."""
    kernel = _variant("gather_gemm_wgrad.cu", p.macros).kernel("wgrad_gemm")
    launch(kernel, p.grid, (p.tile.threads, 1, 1), (x, dy, partial, *p.args), dict(p.macros)["SHARED_BYTES"])


def wgrad_reduce(p: WgradPlan, splits: int, partial, x_exponents, dy_exponents, dw, w_channels_last) -> None:
    """Writes dw, the gradient of w in either format of the weight: the total of `partial`. Exponents may be None.

    splits: sums that `wgrad_sums` wrote one behind the other, p.splits for each time that it ran with a plan p.
    """
    groups, counts = p.grid[2], [0 if e is None else e.size for e in (x_exponents, dy_exponents)]
    channels_in, _, out_octets, taps = p.reduce_args
    block_channels, block_taps = min(32, 8 * out_octets), min(taps, 32)
    share = channels_in * taps * 8 * out_octets * groups // (4 * MULTIPROCESSORS)  # elements of a block
    rows = max(1, max(THREADS, min(16 * THREADS, share)) // (block_channels * block_taps))
    blocks = ceil_div(8 * out_octets, block_channels) * ceil_div(taps, block_taps) * ceil_div(channels_in, rows)
    launch(
        _variant("gather_gemm_wgrad.cu", p.macros).kernel("wgrad_gemm_reduce"),
        (blocks, groups, 1),
        (THREADS, 1, 1),
        (
            partial,
            x_exponents,
            dy_exponents,
            dw,
            *counts,
            *p.reduce_args,
            splits,
            *weight_strides(dw.shape, w_channels_last),
            block_channels,
            block_taps,
            rows,
        ),
        4 * rows * block_channels * (block_taps | 1),
    )


def _variant(file: str, macros) -> Variant:
    return Variant(file, macros, architecture(macros))


def variants():
    """Every variant that this module launches."""
    for dtype, split in (("float", 1), ("float", 2), ("half_t", 1), ("bf16_t", 1)):
        old = dtype != "bf16_t"
        for tile in GATHER[split] + WGMMA[split] + old * GATHER_SM75:
            yield _variant("gather_gemm.cu", tile.macros(dtype, split, k_major=True))
        for tile in WGRAD[split] + WGMMA[split] + old * WGRAD_SM75:
            yield _variant("gather_gemm_wgrad.cu", tile.macros(dtype, split, k_major=False))
        for width in (1, 4):
            yield Variant("gather_gemm_pack.cu", pack_macros(dtype, split, width))
