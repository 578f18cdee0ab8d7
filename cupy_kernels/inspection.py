"""What kernels compile to: registers, memory, occupancy, PTX and machine code (SASS). No GPU is needed.

Names are those of `tinker`.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import compiler, nvrtc, parsing, source
from .backend import MAX_SHARED_BYTES
from .common import THREADS, ceil_div, check_within
from .display import Rows
from .errors import BackendError
from .launch import MAX_THREADS
from .source import Kernel, Variant
from .tinker import files_with, locate

DEFAULT_ARCH = "sm_80"  # where there is no GPU to ask
TOOLKIT = "/usr/local/cuda/bin"

# Threads and blocks that a multiprocessor holds, and its shared memory in KiB. All have 65536 registers.
_MULTIPROCESSORS = {
    "sm_70": (2048, 32, 96),
    "sm_75": (1024, 16, 64),
    "sm_80": (2048, 32, 164),
    "sm_86": (1536, 16, 100),
    "sm_87": (1536, 16, 164),
    "sm_89": (1536, 24, 100),
    "sm_90": (2048, 32, 228),
}

_known_resources = {}  # {(text, macros, architecture): {kernel: resources}}


class Attributes(NamedTuple):
    """Resources of one variant of a kernel.

    macros: those that distinguish it from the other variants.
    registers: per thread.
    local_bytes: local memory per thread, in bytes, where spilled registers go; 0 is best.
    shared_bytes: shared memory per block, in bytes, static and dynamic.
    block: threads per block.
    blocks_per_sm: blocks of this size that fit on a multiprocessor.
    occupancy: their share of a multiprocessor's threads.
    """

    kernel: str
    macros: str
    registers: int
    local_bytes: int
    shared_bytes: int
    block: int
    blocks_per_sm: int | None
    occupancy: str | None


def attributes(
    name: str, arch: str | None = None, *, block: int | None = None, shared_bytes: int = 0, **macros: str | int
) -> Rows:
    """Registers, local and shared memory, and occupancy, of every variant of a kernel or of all kernels of a file.

    name: a kernel, or a file.
    arch: "sm_80", ...: NVRTC compiles for this architecture; no GPU is needed. None: as CuPy compiles for the current
        GPU, or, without a GPU, for DEFAULT_ARCH.
    block: threads per block, for the occupancy. Default: the maximum that __launch_bounds__ allows, else 256.
    shared_bytes: dynamic shared memory per block in bytes, for the occupancy.
    macros: only variants with these values: attributes("tanh_forward", scalar_t="float").

    Variants with wgmma instructions are listed for "sm_90" if there is an NVRTC of CUDA 12 or newer. Current edits are
    included.

    Raises ValueError for an unknown name or arch, for a block or shared memory larger than CUDA allows, and if no
    variant has the macros; TypeError for a block or shared_bytes that is no int; BackendError without NVRTC;
    KernelCompileError for an edited text that does not compile.
    """
    matching = _matching(name, _checked_arch(arch), macros)
    return rows([v.kernel(kernel) for v, names in matching for kernel in names], arch, block, shared_bytes)


def rows(kernels: Sequence[Kernel], arch: str | None, block: int | None, shared_bytes: int) -> Rows:
    """`attributes` of these kernels."""
    measure = _of_gpu if arch is None and _has_gpu() else _of_nvrtc
    arch = _checked_arch(arch)
    if block is not None:
        check_within("block", block, 1, MAX_THREADS, "threads")
    check_within("shared_bytes", shared_bytes, 0, MAX_SHARED_BYTES, "bytes")
    found = list(map(source.in_force, kernels))
    words, common = told_apart([kernel.defines for kernel in found])
    rows = [measure(kernel, arch, block, shared_bytes)._replace(macros=word) for kernel, word in zip(found, words)]
    return Rows(rows, caption=", ".join(filter(None, (arch, common))), hidden=() if any(words) else ("macros",))


def told_apart(defines) -> tuple[list[str], str]:
    """For several lists of macros: the macros of each list that not all lists share, and those that all share."""
    shared = set.intersection(*map(set, defines))

    def words(macros, wanted):
        return " ".join(f"{k}={v}" for k, v in macros if ((k, v) in shared) == wanted)

    return [words(macros, False) for macros in defines], words(defines[0], True)


def ptx(name: str, arch: str | None = None, **macros: str | int) -> str:
    """PTX of a kernel, or of all kernels of a file, compiled by NVRTC. Arguments and errors are those of `attributes`.

    If several variants have these macros, it is the first one.
    """
    kernel, arch = _first(name, arch, macros)
    return kernel_ptx(kernel, arch) if kernel.name else nvrtc.compile_ptx(kernel.variant, arch)


def kernel_ptx(kernel: Kernel, arch: str | None) -> str:
    """PTX of one kernel only."""
    text = nvrtc.compile_ptx(kernel, _checked_arch(arch))
    head, *parts = re.split(r"(?=^\s*// \.globl\s+\w+$)", text, flags=re.MULTILINE)
    return head + next(p for p in parts if re.match(rf"\s*// \.globl\s+{kernel.name}$", p, re.MULTILINE))


def sass(name: str, arch: str | None = None, **macros: str | int) -> str:
    """Machine code (SASS) of what `ptx` shows. Raises its errors, and BackendError if there is no nvdisasm."""
    kernel, arch = _first(name, arch, macros)
    return kernel_sass(kernel, arch) if kernel.name else _disassembled(kernel.variant, arch)


def kernel_sass(kernel: Kernel, arch: str | None) -> str:
    """Machine code of one kernel only."""
    parts = re.split(r"(?=^//-+ \.text\.)", _disassembled(kernel, _checked_arch(arch)), flags=re.MULTILINE)
    return next(p for p in parts if re.match(rf"//-+ \.text\.{kernel.name}\b", p))


def _disassembled(what: Kernel | Variant, arch: str) -> str:
    tool = _disassembler()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(nvrtc.compile_variant(what, arch)[0])
        done = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise BackendError(f"{tool} cannot read code for {arch}: {done.stderr.strip()}")
    return done.stdout


def _checked_arch(arch):
    """`arch`, or `default_arch()` for None. Raises ValueError for an architecture that NVRTC does not know."""
    if arch is None:
        return default_arch()
    known = nvrtc.architectures()
    if str(arch).removesuffix("a") not in known:
        raise ValueError(f"NVRTC {nvrtc.version()} compiles for {', '.join(known)}; received {arch!r}")
    return arch


def default_arch() -> str:
    """The current GPU's architecture, or DEFAULT_ARCH without a GPU."""
    if not _has_gpu():
        return DEFAULT_ARCH
    return f"sm_{compiler.cupy().cuda.Device().compute_capability}"


def occupancy(used: nvrtc.Resources, block: int, shared_bytes: int, arch: str) -> tuple[int, float] | None:
    """(blocks per multiprocessor, their share of its threads) for `arch`; None for one that is not listed here."""
    if arch not in _MULTIPROCESSORS:
        return None
    threads, blocks, shared = _MULTIPROCESSORS[arch]
    warps = ceil_div(block, 32)
    # A warp takes registers in units of 256, from its quarter of the multiprocessor.
    by_registers = 4 * (16384 // (ceil_div(max(used.registers, 1) * 32, 256) * 256)) // (ceil_div(warps, 4) * 4)
    reserved = 1024 if arch >= "sm_80" else 0  # of each block, by the driver
    taken = ceil_div(used.shared_bytes + shared_bytes + reserved, 256) * 256
    fitting = min(blocks, threads // (warps * 32), by_registers, shared * 1024 // taken if taken else blocks)
    return fitting, fitting * warps * 32 / threads


def _matching(name, arch, macros):
    """(variant, names of its kernels) for each variant of a name that has these macros and compiles for `arch`."""
    from .variants import variants

    file, kernel = locate(name)
    if not file.endswith(".cu"):
        raise ValueError(f"{file} is a header; name a kernel, or one of {', '.join(files_with(file))}")
    declared = [v for v in variants() if v.file == file and _can_compile(v, arch)]
    found = [v for v in declared if {k: str(m) for k, m in macros.items()}.items() <= _strings(v).items()]
    if not found:
        there = "\n".join(f"    {_macros(v)}" for v in declared)
        raise ValueError(f"no variant of {name} has {macros}; there are\n{there}")
    return [(v, (kernel,) if kernel else source.kernel_names(file)) for v in found]


def _can_compile(variant, arch):
    if not variant.architecture:
        return True
    try:
        nvrtc.shared_library(nvrtc.WGMMA_MAJOR)
    except BackendError:
        return False
    return variant.architecture.startswith(arch)


def _first(name, arch, macros):
    """(kernel, arch) of the first variant. The kernel's name is empty for a file."""
    arch = _checked_arch(arch)
    variant, names = _matching(name, arch, macros)[0]
    kernel = source.in_force(variant.kernel(names[0]))
    return kernel if locate(name)[1] else kernel._replace(name=""), arch


def _strings(variant):
    return {k: str(v) for k, v in variant.defines}


def _macros(variant: Variant):
    return " ".join(f"{k}={v}" for k, v in variant.defines)


def _has_gpu():
    try:
        compiler.cupy()
    except BackendError:
        return False
    return True


def _resources(kernel, arch):
    """Resources of the kernel, compiled once for each text."""
    key = source.unit(kernel), kernel.defines, arch
    if key not in _known_resources:
        _known_resources[key] = nvrtc.compile_variant(kernel, arch)[1]
    return _known_resources[key][kernel.name]


def _of_nvrtc(kernel, arch, block, shared_bytes):
    used = _resources(kernel, arch)
    block = block or used.max_threads or THREADS
    fits = occupancy(used, block, shared_bytes, arch)
    return _attributes(kernel, used, used.stack_bytes, block, shared_bytes, *(fits or (None, None)))


def _of_gpu(kernel, arch, block, shared_bytes):
    function, cuda = compiler.backend.function(kernel, shared_bytes), compiler.cupy().cuda
    # Without __launch_bounds__ a kernel may have the most threads that its registers leave room for.
    bound = function.max_threads_per_block
    used = nvrtc.Resources(function.num_regs, function.local_size_bytes, 0, function.shared_size_bytes)
    block = block or (bound if "__launch_bounds__" in _declaration(kernel) else THREADS)
    fits = cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(function.kernel.ptr, block, shared_bytes)
    most = cuda.Device().attributes["MaxThreadsPerMultiProcessor"]
    return _attributes(kernel, used, used.stack_bytes, block, shared_bytes, fits, fits * block / most)


def _declaration(kernel):
    text = source.expanded(kernel.file)
    start, _ = parsing.span(text, kernel.name)
    return text[start : text.index("{", start)]


def _attributes(kernel, used, local_bytes, block, shared_bytes, blocks, share):
    share = None if share is None else f"{share:.0%}"
    shared_bytes += used.shared_bytes
    row = (kernel.name, "", used.registers, local_bytes, shared_bytes, block, blocks, share)
    return Attributes(*row)


def _disassembler() -> str:
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else ()
    folders = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders += [TOOLKIT, *(str(p) for root in roots for p in sorted(Path(root).glob("*/bin")))]
    tool = shutil.which("nvdisasm") or shutil.which("nvdisasm", path=os.pathsep.join(folders))
    if not tool:
        raise BackendError(
            "no nvdisasm found, which turns a kernel's binary into text: python3 -m pip install "
            "nvidia-cuda-nvdisasm, or put the bin folder of a CUDA toolkit in PATH. ptx() needs neither"
        )
    return tool
