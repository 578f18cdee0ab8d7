"""Every declared variant, compiled by NVRTC for every architecture without a GPU: it must need no local memory."""

import hashlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from cupy_kernels import cache, nvrtc, source
from cupy_kernels.errors import BackendError
from cupy_kernels.source import Kernel
from cupy_kernels.variants import variants

ARCHITECTURES = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90")


def version(least_major):
    try:
        return nvrtc.version(least_major)
    except BackendError:
        return None


VERSION = version(11)
WGMMA_VERSION = version(nvrtc.WGMMA_MAJOR)
needs_nvrtc = pytest.mark.skipif(not VERSION, reason="needs NVRTC, of a CUDA toolkit or a wheel")
MEASURED = "11.8"  # Others allocate registers otherwise: with them, what runs by this version must only compile.

# Bytes, by kernel, SPLIT, and whether it goes with wgmma. A warp's 128 sums of the float32 class leave too few
# registers, and some that are read once a tap or less go to local memory. Half as many sums need none of it, and were
# slower when both were measured: 2.42 ms for 2.23, now 1.97 (benchmarks/history.md).
SPILLS = {("conv_bn_pool", 2, False): 84, ("conv_transpose_mma", 2, False): 56}
# By wgmma, threads that copy have 72 registers and those that multiply 216. What goes to local memory is read once a
# pass or chunk, not in the loops over taps (by the SASS of the fp32 class); the kernels became faster with it.
SPILLS |= {("conv_bn_pool", 1, True): 60, ("conv_bn_pool", 2, True): 232}
SPILLS |= {("conv_transpose_mma", 1, True): 40, ("conv_transpose_mma", 2, True): 280}
# Two registers, so that three blocks run on an SM at once.
SPILLS |= {("conv_output_gradient_packed", 2, wgmma): 8 for wgmma in (False, True)}
SPILLS[("depthwise_gather", None, False)] = SPILLS[("channel_sum_partials", None, False)] = 16  # of double, on sm_70
# Of 16 bits, on GPUs older than sm_90 most of it.
SPILLS |= {("batch_norm_resident_backward", None, False): 480, ("batch_norm_resident_forward", None, False): 96}
SPILLS |= {(f"batch_norm_{way}", None, False): 256 for way in ("forward", "backward")}
SPILLS[("batch_norm_partials", None, False)] = 52
# Of sm_90, where ptxas gives these 32 registers. They are small: a block combines what few blocks have summed up.
SPILLS |= {
    (f"{norm}_statistics{last}", None, False): 8
    for norm, last in (("batch_norm", ""), ("group_norm", "_channels_last"))
}
SPILLS[("group_norm_backward_means_channels_last", None, False)] = 64
# Bytes of arrays that NVRTC 11.8 does not keep in registers, though every index is known: of 3x3 windows.
STACKS = {"bn_pool_forward": 80, "bn_pool_backward": 80}


def goes_with_wgmma(variant):
    """Whether it runs only where wgmma does, and is compiled by what knows wgmma."""
    return ("WGMMA", 1) in variant.defines


def resources(variant, architecture):
    """What `compile_variant` reports, kept on disk: with nothing changed, a second run of the tests need not wait."""
    major, version = (nvrtc.WGMMA_MAJOR, WGMMA_VERSION) if goes_with_wgmma(variant) else (11, VERSION)
    key = repr((version, source.expanded(variant.file), variant.defines, architecture))
    kept = cache.entry(
        f"nvrtc_{hashlib.sha256(key.encode()).hexdigest()}.json",
        lambda: json.dumps(nvrtc.compile_variant(variant, architecture, major)[1]).encode(),
    )
    return {name: nvrtc.Resources(*used) for name, used in json.loads(cache.read(kept)).items()}


@needs_nvrtc
@pytest.mark.parametrize("file", sorted({v.file for v in variants()}))
def test_no_variant_needs_local_memory(file):
    of_tensor_cores = ("mma.cuh", "pooled_planes.cuh")  # the second: what runs behind their convolution
    tensor_cores = any(f'#line 1 "{name}"' in source.expanded(file) for name in of_tensor_cores)
    known, jobs = nvrtc.architectures(), []
    for variant in (v for v in variants() if v.file == file and not goes_with_wgmma(v)):
        oldest = "sm_75" if ("SM75", 1) in variant.defines else "sm_80" if tensor_cores else "sm_70"
        jobs += [(variant, a) for a in ARCHITECTURES if a in known and a >= oldest]
    check_memory(jobs)


@pytest.mark.skipif(not WGMMA_VERSION, reason=f"needs NVRTC {nvrtc.WGMMA_MAJOR} or newer, which knows sm_90a")
@pytest.mark.parametrize("file", sorted({v.file for v in variants() if goes_with_wgmma(v)}))
def test_no_variant_that_goes_with_wgmma_needs_local_memory(file):
    check_memory([(v, v.architecture or "sm_90") for v in variants() if v.file == file and goes_with_wgmma(v)])


def check_memory(jobs):
    with ProcessPoolExecutor(os.cpu_count()) as pool:  # NVRTC compiles one program at a time in a process
        for job, kernels in zip(jobs, pool.map(resources, *zip(*jobs))):
            assert kernels
            if VERSION != MEASURED and not goes_with_wgmma(job[0]):
                continue
            for name, used in kernels.items():
                allowed = SPILLS.get((name, dict(job[0].defines).get("SPLIT"), goes_with_wgmma(job[0])), 0)
                assert used.spill_bytes <= allowed, f"{name} of {job[0]} for {job[1]}: {used}"
                stack = used.stack_bytes if not used.spill_bytes else 0
                assert stack <= STACKS.get(name, 0), f"{name} of {job[0]} for {job[1]}: {used}"


@needs_nvrtc
@pytest.mark.parametrize("file", sorted({v.file for v in variants()}))
def test_kernels_wait_before_they_use_memory(file):
    """The compiler could move a load, and the wait for earlier kernels is the first statement only in the text."""
    variant = next(v for v in variants() if v.file == file and not goes_with_wgmma(v))
    kernels = source.kernel_names(file)
    _, *bodies = nvrtc.compile_ptx(variant, "compute_90").split(".entry ")
    assert len(bodies) == len(kernels)
    for name, body in zip(kernels, sorted(bodies, key=lambda b: kernels.index(b[: b.index("(")]))):
        before, wait, _ = body.partition("griddepcontrol.wait")
        if not source.cooperative(variant.kernel(name)):
            assert wait, name
            assert not re.search(r"\b(ld|st|red|atom|cp)\.(?!param)", before), name


@needs_nvrtc
def test_mbarriers():
    """The instructions that the emulator stands in for; a GPU that has no wgmma compiles the header to nothing."""
    text = """#include "common.cuh"
    #include "mbarrier.cuh"
    extern "C" __global__ void copied(const float* x, float* y) {
        __shared__ __align__(16) float s[4];
        __shared__ MBarrier full;
        fewer_registers<24>(), more_registers<32>();
        mbarrier_init(full, 2);
        mbarrier_arrive(full), mbarrier_arrive(full, 16);
        bulk_copy(s, x, 16, full);
        mbarrier_wait(full, 0), mbarrier_wait(full, 1);
        y[threadIdx.x] = s[threadIdx.x];
    }"""
    with source.override({"mbarriers.cu": text}):
        for architecture in ("sm_80", "sm_90"):
            assert "mbarrier" not in nvrtc.compile_ptx(Kernel("mbarriers.cu", "copied"), architecture)
        if WGMMA_VERSION:
            ptx = nvrtc.compile_ptx(Kernel("mbarriers.cu", "copied", architecture="sm_90a"), "sm_90")
            for part in ("init", "arrive.shared", "arrive.expect_tx", "try_wait.parity"):
                assert f"mbarrier.{part}" in ptx
            assert "cp.async.bulk" in ptx
            assert ptx.count("setmaxnreg") == 2


@needs_nvrtc
def test_spills_are_seen():
    text = """extern "C" __global__ void __launch_bounds__(1024) spill(const float* x, float* y, int n) {
        float v[200];
        #pragma unroll
        for (int i = 0; i < 200; i++) v[i] = x[threadIdx.x * 200 + i];
        for (int k = 0; k < n; k++)
            #pragma unroll
            for (int i = 0; i < 200; i++) v[i] = v[i] * v[(i + 1) % 200] + k;
        #pragma unroll
        for (int i = 0; i < 200; i++) y[threadIdx.x * 200 + i] = v[i];
    }
    extern "C" __global__ void lean(float* y) { y[threadIdx.x] = 1; }
    extern "C" __global__ void indexed(float* y, int i) {
        float v[64];
        for (int k = 0; k < i; k++) v[k * k % 64] = y[k];
        y[threadIdx.x] = v[threadIdx.x % 64];
    }"""
    with source.override({"spill.cu": text}):
        kernels = resources(Kernel("spill.cu", "spill").variant, "sm_80")
    assert kernels["spill"].spill_bytes
    assert kernels["indexed"].stack_bytes
    assert kernels["lean"].spill_bytes == kernels["lean"].stack_bytes == 0
    assert 0 < kernels["lean"].registers < 16


@pytest.mark.skipif(not WGMMA_VERSION, reason=f"needs NVRTC {nvrtc.WGMMA_MAJOR} or newer, which knows sm_90a")
def test_what_a_kernel_uses_that_ptxas_warns_of():
    """Of some wgmma kernels ptxas first says that it injects instructions, in lines that name the kernel."""
    of_wgmma = [v for v in variants() if v.file == "conv_wgrad_mma.cu" and v.architecture]
    used = nvrtc.compile_variant(of_wgmma[0], of_wgmma[0].architecture, nvrtc.WGMMA_MAJOR)[1]
    assert all(kernel.registers for kernel in used.values()), used


def test_every_kernel_is_declared():
    assert {v.file for v in variants()} == {f for f in source.names() if f.endswith(".cu")}


def test_no_variant_is_declared_twice():
    assert len(set(variants())) == len(list(variants()))


@pytest.mark.skipif(version(11) is None, reason="no NVRTC")
def test_the_thread_s_locale_stays():
    script = """
import ctypes, cupy_kernels
nl_langinfo = ctypes.CDLL(None).nl_langinfo
nl_langinfo.restype = ctypes.c_char_p
encoding = lambda: nl_langinfo(14)  # CODESET
before = encoding()
cupy_kernels.ptx("tanh_forward", "sm_80")
assert before == encoding() == b"UTF-8", (before, encoding())
"""
    environ = {**os.environ, "LC_ALL": "C.UTF-8", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
