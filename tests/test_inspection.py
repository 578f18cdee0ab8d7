"""Attributes, PTX and SASS of kernels, of edited ones too."""

import stat
import sys

import numpy as np
import pytest
import torch

import cupy_kernels
from cupy_kernels import inspection, nvrtc
from cupy_kernels.errors import BackendError
from modelnew.functional import tanh


@pytest.fixture
def needs_nvrtc():
    try:
        nvrtc.shared_library()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("needs_nvrtc")
def test_attributes_without_a_gpu():
    rows = cupy_kernels.attributes("tanh_forward", "sm_90", scalar_t="float")
    assert [row.macros for row in rows] == ["WIDTH=1", "WIDTH=4"]
    for row in rows:
        assert 8 < row.registers < 64
        assert (row.local_bytes, row.shared_bytes, row.block) == (0, 0, 256)
        assert row.occupancy == "100%"
    assert "sm_90, scalar_t=float acc_t=float" in repr(rows)
    fit = {"scalar_t": "float", "WIDTH": 4, "param_t": "float", "PLANES": 1}
    row = cupy_kernels.attributes("batch_norm_partials", "sm_80", **fit)[0]
    assert row.block == 256
    assert row.blocks_per_sm >= 3  # as __launch_bounds__ demands
    assert {row.kernel for row in cupy_kernels.attributes("tanh", "sm_70", scalar_t="half_t")} == {
        "tanh_forward",
        "tanh_backward",
    }


@pytest.mark.usefixtures("needs_nvrtc")
def test_attributes_that_cannot_be():
    for arch in ("sm_99", "90", 90):
        with pytest.raises(ValueError, match=rf"NVRTC [\d.]+ compiles for .*sm_80.*; received {arch!r}"):
            cupy_kernels.attributes("tanh_forward", arch)
    for options, error, message in (
        ({"block": 2048}, ValueError, "block must be 1 to 1024 threads, received 2048"),
        ({"block": "a"}, TypeError, "block must be an int, received 'a'"),
        ({"shared_bytes": -1}, ValueError, "shared_bytes must be 0 to 232448 bytes, received -1"),
        ({"shared_bytes": "a"}, TypeError, "shared_bytes must be an int, received 'a'"),
    ):
        with pytest.raises(error, match=message):
            cupy_kernels.attributes("tanh_forward", "sm_80", **options)
    assert cupy_kernels.attributes("tanh_forward", "sm_80", block=np.int64(128))


@pytest.mark.usefixtures("needs_nvrtc")
def test_attributes_of_an_edit_and_for_a_block():
    fit = {"arch": "sm_80", "scalar_t": "float", "WIDTH": 4}
    (before,) = cupy_kernels.attributes("tanh_forward", **fit)
    (crowded,) = cupy_kernels.attributes("tanh_forward", block=1024, shared_bytes=100 << 10, **fit)
    assert (crowded.block, crowded.blocks_per_sm, crowded.occupancy) == (1024, 1, "50%")
    with cupy_kernels.override({"tanh_forward": {"acc_t": "double"}}):
        (double,) = cupy_kernels.attributes("tanh_forward", **fit)
    assert double.registers != before.registers
    assert cupy_kernels.attributes("tanh_forward", **fit) == [before]


def test_occupancy():
    used = nvrtc.Resources(registers=128, stack_bytes=0, spill_bytes=0, shared_bytes=0)
    assert inspection.occupancy(used, 256, 0, "sm_90") == (2, 0.25)
    assert inspection.occupancy(used._replace(registers=32), 256, 0, "sm_75") == (4, 1.0)
    assert inspection.occupancy(used._replace(registers=32), 32, 0, "sm_86") == (16, 16 * 32 / 1536)
    assert inspection.occupancy(used._replace(registers=255), 256, 200 << 10, "sm_90") == (1, 0.125)
    assert inspection.occupancy(used._replace(registers=255), 256, 200 << 10, "sm_70") == (0, 0.0)
    assert inspection.occupancy(used, 256, 0, "sm_999") is None


@pytest.mark.usefixtures("needs_nvrtc")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_attributes_on_a_gpu():
    """The driver's occupancy, and what is computed for the same architecture without it."""
    tanh(torch.ones(4, device="cuda"))  # torch's context is CuPy's
    for row in cupy_kernels.attributes("tanh", scalar_t="float"):
        used = nvrtc.Resources(row.registers, row.local_bytes, 0, row.shared_bytes)
        known = inspection.occupancy(used, row.block, 0, inspection.default_arch())
        assert row.local_bytes == 0
        assert known is None or known[0] == row.blocks_per_sm


@pytest.mark.usefixtures("needs_nvrtc")
def test_ptx():
    text = cupy_kernels.ptx("tanh_backward", "sm_80", scalar_t="float", WIDTH=4)
    assert ".target sm_80" in text
    assert ".entry tanh_backward(" in text
    assert "ld.global.nc.v4" in text or "ld.global.v4" in text
    assert "tanh_forward" not in text
    assert ".entry tanh_forward(" in cupy_kernels.ptx("tanh.cu")
    with pytest.raises(ValueError, match=r"no variant of tanh_forward has \{'WIDTH': 3\}; there are\n .*WIDTH=1"):
        cupy_kernels.ptx("tanh_forward", WIDTH=3)
    with pytest.raises(ValueError, match=r"tanh.cuh is a header; name a kernel, or one of .*tanh\.cu"):
        cupy_kernels.ptx("tanh.cuh")


@pytest.mark.usefixtures("needs_nvrtc")
def test_ptx_of_a_variant_for_one_architecture(monkeypatch):
    with pytest.raises(ValueError, match=r"no variant of conv_transpose_mma has \{'WGMMA': 1\}"):
        cupy_kernels.ptx("conv_transpose_mma", "sm_80", WGMMA=1)
    try:
        text = cupy_kernels.ptx("conv_transpose_mma", "sm_90", WGMMA=1)
    except ValueError as error:
        pytest.skip(f"no NVRTC {nvrtc.WGMMA_MAJOR} or newer: {str(error).splitlines()[0]}")
    assert ".target sm_90a" in text
    assert "wgmma.mma_async" in text


@pytest.mark.usefixtures("needs_nvrtc")
def test_sass(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(inspection, "TOOLKIT", str(tmp_path))
    monkeypatch.setattr(inspection.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"no nvdisasm found.*pip install nvidia-cuda-nvdisasm"):
        cupy_kernels.sass("tanh_forward")
    script = f"""#!{sys.executable}
import sys
assert sys.argv[1] == "-c" and open(sys.argv[2], "rb").read(4) == b"\\x7fELF"
print("header")
for name in ("tanh_backward", "tanh_forward"):
    print(f"//----- .text.{{name}}  -----\\n  EXIT of {{name}} ;")
"""
    tool = tmp_path / "nvdisasm"
    tool.write_text(script)
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    assert "EXIT of tanh_forward" in cupy_kernels.sass("tanh_forward")
    assert "tanh_backward" not in cupy_kernels.sass("tanh_forward")
    assert cupy_kernels.sass("tanh.cu").startswith("header")
    tool.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('unknown architecture')")
    with pytest.raises(BackendError, match="cannot read code for sm_80: unknown architecture"):
        cupy_kernels.sass("tanh_forward")


@pytest.mark.usefixtures("needs_nvrtc")
def test_sass_by_nvidia_s_tool():
    try:
        text = cupy_kernels.sass("tanh_forward", "sm_80")
    except BackendError as error:
        pytest.skip(str(error))
    assert "EXIT" in text
    assert "tanh_backward" not in text
