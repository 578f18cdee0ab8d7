"""Tensors [N, C, H, W] as packed fp16 tiles [N, chunks, H * W, 64] under one power-of-two scale, see fp16_tiles.cu.

A line is the 64 values of a pixel. With split 1, these are the fp16 values of 64 channels. With split 2, they are the
fp16 values of 32 channels, then the 32 residuals, which are the rounding errors of those values. An array of exponents
belongs to the tiles; the smallest of them is the scale's.
"""

import math

from .common import THREADS, ceil_div, row_width, scalar, scalar_macros
from .launch import launch
from .source import Kernel, Variant

_LARGEST_BLOCKS = 1024  # fills today's largest GPUs; a constant, so that `exponents` depends on shapes alone
_BATCH = 8  # accesses of at most 16 bytes that a thread of largest_magnitude has in flight
LINE_BYTES = 128


def chunk_channels(split: int) -> int:
    """The number of channels in a line."""
    return LINE_BYTES // 2 // split


def packing_macros(split: int) -> dict:
    """Macros of fp16_tiles.cuh, without IN_CHANNELS."""
    return {"SPLIT": split, "CHUNK_CHANNELS": chunk_channels(split), "LINE_BYTES": LINE_BYTES}


def packed_shape(shape, split: int) -> tuple[int, int, int, int]:
    """[N, chunks, pixels, 64], the shape of the packed float16 tiles of a tensor of this shape."""
    return shape[0], ceil_div(shape[1], chunk_channels(split)), math.prod(shape[2:]), LINE_BYTES // 2


def exponents_size(shape, itemsize: int) -> int:
    """Number of int32 elements that `largest_magnitude` writes for a tensor of this shape."""
    return max(1, min(_LARGEST_BLOCKS, ceil_div(math.prod(shape) * itemsize, THREADS * _BATCH * 16)))


def largest_magnitude(source, exponents) -> None:
    """Writes `exponents`: for each part of `source`, the exponent of the scale that fits this part."""
    width = access_width(source, math.prod(source.shape[2:]))
    kernel = Kernel("fp16_tiles.cu", "largest_magnitude", _macros(scalar(source), 1, width))
    launch(kernel, (exponents.size, 1, 1), (THREADS, 1, 1), (source, exponents, source.size))


def pack_fp16(source, exponents, sums, packed, split: int) -> None:
    """Writes `packed`, the tiles of `source`, under the scale of the smallest of `exponents`.

    source: its number of channels is a multiple of 8.
    sums: None, or the sum of each channel of the first image. Then the channels' means are subtracted, and the scale is
        half as large.
    """
    (images, channels), pixels = source.shape[:2], math.prod(source.shape[2:])
    width = access_width(source, pixels)
    launch(
        Kernel("fp16_tiles.cu", "pack_fp16", _macros(scalar(source), split, width)),
        (ceil_div(images * pixels, tile_pixels(split, width)), ceil_div(channels, chunk_channels(split)), 1),
        (THREADS, 1, 1),
        (source, exponents, sums, packed, exponents.size, images, channels, pixels),
    )


def scale_fp16(source, exponents, scaled) -> None:
    """Writes `scaled`, float16 of the shape of `source`, under the scale of the smallest of `exponents`."""
    width = access_width(source, source.size)
    kernel = Kernel("fp16_tiles.cu", "scale_fp16", _macros(scalar(source), 1, width))
    blocks = ceil_div(source.size, THREADS * width)
    launch(kernel, (blocks, 1, 1), (THREADS, 1, 1), (source, exponents, scaled, exponents.size, source.size))


def variants():
    """Every variant that this module launches."""
    for name, split in (("float", 1), ("float", 2), ("half_t", 1), ("bf16_t", 1)):
        for width in (1, 4):
            yield Variant("fp16_tiles.cu", _macros(name, split, width))


def _macros(name, split, width):
    sizes = {"WIDTH": width, "THREADS": THREADS, "BATCH": _BATCH}
    return (*scalar_macros(name), *packing_macros(split).items(), *sizes.items())


def tile_pixels(split: int, width: int) -> int:
    """Pixels that a block packs. A thread has 8 channels of `width` of them."""
    return THREADS * 8 // chunk_channels(split) * width


def access_width(source, length: int) -> int:
    """Elements of an access to rows of this length: four, or one where these do not divide."""
    return 4 if row_width(length, source) >= 4 else 1
