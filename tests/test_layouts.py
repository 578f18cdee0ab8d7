"""Layouts are computed once, on the host: a kernel with a value that is not its own does not compile."""

import pytest
import torch

from cupy_kernels import emulator, source
from cupy_kernels.errors import KernelCompileError
from cupy_kernels.launch import observed
from cupy_kernels.source import Kernel
from cupy_kernels.variants import variants
from modelnew import ModelNew

PACKING = {"CHUNK_CHANNELS": lambda m: m["CHUNK_CHANNELS"] // 2, "LINE_BYTES": lambda m: 64}
PLANES = {
    "UNITS": lambda m: m["UNITS"] + 1,
    "WINDOW_PITCH": lambda m: m["WINDOW_PITCH"] - 1,
    "PLANE_STRIDE": lambda m: m["PLANE_STRIDE"] // 8 * 4,
}
UNIT = {
    **PACKING,
    **PLANES,
    "THREADS": lambda m: m["THREADS"] + 64,
    "TILE_M": lambda m: m["TILE_M"] * 2,
    "WARPS_N": lambda m: m["WARPS_N"] * 2,
    "UNIT_WINDOWS": lambda m: m["UNIT_WINDOWS"] * 2,
    "GAP": lambda m: m["GAP"] - 1,
    "PACKED_WIDTH": lambda m: m["PACKED_WIDTH"] - 8 * m["SPLIT"],
}
MMA = {
    **UNIT,
    "UNIT_PASSES": lambda m: m["UNIT_PASSES"] + 1,
    "BAND_ROWS": lambda m: m["BAND_ROWS"] - 1,
    "SHARED_BYTES": lambda m: m["SHARED_BYTES"] - (m["IN_W"] + m["GAP"]) * m["LINE_BYTES"],  # a row of the band
}
WGMMA = {
    **UNIT,
    "UNIT_STRIDE": lambda m: m["UNIT_STRIDE"] - 8,
    "UNIT_ROWS": lambda m: m["UNIT_ROWS"] + 1,
    "ALONG": lambda m: m["ALONG"] - 128,
    "SHARED_BYTES": lambda m: m["SHARED_BYTES"] - 2 * m["WINDOW_PITCH"] * 16,
}
SIMT = {
    "THREADS": lambda m: m["THREADS"] * 2,
    "TILE_N": lambda m: m["TILE_N"] + 4,
    "TILE_K": lambda m: 1,
}
GEMM = {
    **PACKING,
    "THREADS": lambda m: m["THREADS"] * 2,
    "WARPS_M": lambda m: m["WARPS_M"] * 2,
    "STAGES": lambda m: m["STAGES"] + 1,
    "SHARED_BYTES": lambda m: m["SHARED_BYTES"] - 16,
}
WGRAD = {
    **PACKING,
    "THREADS": lambda m: 320,
    "TILES": lambda m: m["TILES"] - 1,
    "COLUMNS": lambda m: m["COLUMNS"] + 1,
    "BAND_ROWS": lambda m: 8,
    "STAGES": lambda m: m["STAGES"] - 1,
    "SHARED_BYTES": lambda m: m["SHARED_BYTES"] - 16,
}
STATISTICS = {"STATISTICS": lambda m: 1 - m["STATISTICS"]}  # whose moments are part of SHARED_BYTES
SITE = {"SITE": lambda m: 3 - m["SITE"]}
# {(file, WGMMA): {macro: a wrong value}}
WRONG = {
    ("conv_transpose_mma.cu", 0): MMA,
    ("conv_transpose_mma.cu", 1): WGMMA,
    ("conv_bn_pool.cu", 0): {name: MMA[name] for name in ("SHARED_BYTES", "THREADS")} | STATISTICS,
    ("conv_bn_pool.cu", 1): {name: WGMMA[name] for name in ("SHARED_BYTES", "THREADS")} | STATISTICS,
    ("pack_weight_fp16.cu", 0): {**PACKING, "PACKED_WIDTH": UNIT["PACKED_WIDTH"]},
    ("pack_weight_fp16.cu", 1): {**PACKING, "PACKED_WIDTH": UNIT["PACKED_WIDTH"]},
    ("conv_wgrad_mma.cu", 0): WGRAD,
    ("conv_wgrad_mma.cu", 1): {**WGRAD, "TILE_IC": lambda m: 128, "TILE_OC": lambda m: m["TILE_OC"] // 2},
    ("conv_transpose.cu", None): SIMT,
    ("conv_transpose_wgrad.cu", None): SIMT,
    ("gather_gemm.cu", 0): GEMM,
    ("gather_gemm.cu", 1): GEMM,
    ("gather_gemm_wgrad.cu", 0): GEMM,
    ("gather_gemm_wgrad.cu", 1): GEMM,
    ("gather_gemm_pack.cu", None): PACKING,
    ("fp16_tiles.cu", None): PACKING,
    ("pooled_tail.cu", 0): {**PLANES, "PARTS": lambda m: m["PARTS"] - 1},
    ("pooled_tail.cu", 1): PLANES,
    ("pooled_tail_backward.cu", 0): {
        **PACKING,
        "THREADS": lambda m: 320,
        "TILE": lambda m: m["TILE"] * 2,
        "BORDER_BLOCKS": lambda m: m["BORDER_BLOCKS"] - 1,
    },
    ("batch_norm.cu", None): {"KEPT": lambda m: m["KEPT"] - 1},
    ("group_norm_channels_last.cu", None): {"KEPT": lambda m: m["KEPT"] - 1},
    ("group_norm.cu", None): {"COLUMNS": lambda m: 12},
    ("max_pool.cu", None): SITE,
    ("bn_tanh_max_pool.cu", None): SITE,
}


def macros_of(file, wgmma):
    """Those of a variant that has something of everything: the one with the largest output or widest access."""
    found = (dict(v.defines) for v in variants() if v.file == file)
    return max((m for m in found if m.get("WGMMA") == wgmma), key=lambda m: (m.get("OUT_H", 0), m.get("WIDTH", 0)))


@pytest.mark.parametrize(
    ("file", "wgmma", "macro"),
    [(*kind, macro) for kind, macros in WRONG.items() for macro in macros],
    ids=lambda value: str(value),
)
def test_a_wrong_value_does_not_compile(file, wgmma, macro):
    macros = macros_of(file, wgmma)
    wrong = {**macros, macro: WRONG[file, wgmma][macro](macros)}
    assert wrong != macros
    with pytest.raises(KernelCompileError, match=r"static.assert"):
        emulator.backend.prepare([Kernel(file, source.kernel_names(file)[0], tuple(wrong.items()))])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_launches_are_as_the_macros_say(device, wgmma, training):
    seen = {}

    def note(kernel, grid, block, args, shared_bytes):
        macros = dict(kernel.defines)
        if "SHARED_BYTES" in macros and kernel.name in kernel.file:
            seen[kernel.name] = macros["WGMMA"]
            assert (block[0], shared_bytes) == (macros["THREADS"], macros["SHARED_BYTES"])
            assert grid[0] % macros.get("UNITS", macros.get("TILES")) == 0

    model = ModelNew(16, 144, 3, 1, 1, 1, 3, numerics="tf32", device=device).train(training)
    x = torch.randn(1, 16, 18, 20, device=device, requires_grad=True)
    with observed(note):
        model(x).sum().backward()
    assert seen == dict.fromkeys(("conv_bn_pool", "conv_transpose_mma", "conv_wgrad_mma"), int(wgmma))
