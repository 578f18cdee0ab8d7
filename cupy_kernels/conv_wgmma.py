"""How conv_wgmma.cuh, the tensor-core convolution of sm_90a, lays a convolution out over blocks."""

from typing import NamedTuple

from .common import ceil_div

_MOST_TILES = {False: 16, True: 18}  # by dgrad; two sums of 8 pixels and 64 channels in the registers of a warpgroup
_STAGES = (6, 5, 4)  # preferred first
_STEP_CHANNELS = 32
_FEW_WINDOWS = 64  # of a block, for few images


class Layout(NamedTuple):
    """How a tensor-core convolution is laid out over blocks."""

    macros: dict
    packed_width: int  # halves that the packed weights have of each of their rows and each tap
    units: int  # blocks an image, for each tile_m channels
    tile_m: int
    threads: int
    shared_bytes: int
    planes: dict  # macros of pooled_planes.cuh


def layout(dgrad: bool, many_images: bool, channels, size, out, kernel, pad, limit: int) -> Layout | None:
    """The layout, or None if there is not enough shared memory.

    many_images: whether a block takes as much of an image as fits, or little of it, so that few images fill the GPU.
    channels: (of x, of the output). size, out, kernel, pad: (height, width). limit: bytes of shared memory.
    """
    warpgroups_m = 1 if channels[1] <= 64 else 2
    warpgroups_n = 2 // warpgroups_m
    steps = ceil_div(channels[0], _STEP_CHANNELS)
    step_bytes = warpgroups_m * 64 * _STEP_CHANNELS * 2
    gap = max(0, kernel[1] - 1 - pad[1])
    pitch = ceil_div(max(size[1] + gap, out[1]), 2) * 2
    window_pitch, windows_w, windows_h = pitch // 2, ceil_div(out[1], 2), ceil_div(out[0], 2)
    for units in range(1, windows_h + 1):
        rows = ceil_div(windows_h, units)
        windows = (rows - 1) * window_pitch + windows_w
        low, high = pad[0] - (kernel[0] - 1), 2 * rows - 1 + pad[0]  # LOW, HIGH and, below, ALONG of conv_wgmma.cuh
        band_cells = gap + (high - low + 1) * pitch
        along = ceil_div(band_cells * 16 - 16, 128) * 128 + 16
        band_bytes = ceil_div(steps * _STEP_CHANNELS // 8 * along, 128) * 128
        stages = next((n for n in _STAGES if band_bytes + n * step_bytes <= limit), None)
        if stages and (many_images or windows <= _FEW_WINDOWS or rows == 1):
            break
    else:
        return None
    most = 4 * _MOST_TILES[dgrad] * warpgroups_n
    last_windows = (windows - 1) % most + 1
    # Warpgroups begin at multiples of four tiles, which conv_bn_pool keeps together.
    tile_windows = 4 * warpgroups_n if dgrad or warpgroups_n == 1 else 16 * warpgroups_n
    last = ceil_div(last_windows, tile_windows) * tile_windows // (4 * warpgroups_n)
    tiles = _MOST_TILES[dgrad] if windows > most else last
    macros = {
        "WARPGROUPS_M": warpgroups_m,
        "WARPGROUPS_N": warpgroups_n,
        "UNIT_ROWS": rows,
        "TILES": tiles,
        "LAST_TILES": last,
        "STAGES": stages,
    }
    units = ceil_div(windows_h, rows)
    return Layout(
        macros,
        steps * _STEP_CHANNELS,
        units,
        64 * warpgroups_m,
        128 * warpgroups_m * warpgroups_n,
        band_bytes + stages * step_bytes,
        planes(1, window_pitch, rows * window_pitch, stride := ceil_div(rows * window_pitch, 16) * 16, units * stride),
    )


def planes(wgmma: int, window_pitch: int, unit_windows: int, unit_stride: int, plane_stride: int) -> dict:
    """Macros of pooled_planes.cuh."""
    return {
        "WGMMA": wgmma,
        "WINDOW_PITCH": window_pitch,
        "UNIT_WINDOWS": unit_windows,
        "UNIT_STRIDE": unit_stride,
        "PLANE_STRIDE": plane_stride,
    }
