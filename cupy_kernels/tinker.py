"""Look at the kernels, and change them: the functions that `cupy_kernels` itself offers.

A name is a kernel's ("tanh_forward"), or a file's ("tanh.cu", "tanh.cuh"; "tanh" is "tanh.cu").
"""

import contextlib
import difflib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from . import compiler, nvrtc, source
from .common import THREADS, ceil_div
from .display import Rows, highlighted
from .errors import BackendError
from .launch import MAX_THREADS
from .source import Variant

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


class KernelInfo(NamedTuple):
    """A kernel, as `kernels` lists it.

    variants: how many sets of macros the host compiles the file with; for kernels that are specialised for a shape,
    only some shapes count. macros: names of the macros. values: the values of each macro.
    """

    name: str
    file: str
    parameters: str
    variants: int
    macros: str
    values: tuple[str, ...]


class Attributes(NamedTuple):
    """What one variant of a kernel takes.

    macros: those that the variants do not share.
    registers: per thread. local_bytes: of local memory per thread, where spilled registers go; 0 is best.
    shared_bytes: per block, static and dynamic. block: threads. blocks_per_sm, occupancy: how many such blocks a
    multiprocessor holds, and the share of its threads that they are.
    """

    kernel: str
    macros: str
    registers: int
    local_bytes: int
    shared_bytes: int
    block: int
    blocks_per_sm: int | None
    occupancy: str | None


def kernels(name: str | None = None) -> Rows:
    """All kernels of the package, or those of `name` (of a header: of the files that include it): file, parameters, and
    how many variants with which macros.

    A table of several files does not show parameters and values of macros; the items have them. `attributes` has a row
    for each variant.
    """
    from .variants import shape_macros, variants  # imports every operator

    declared = {}
    for variant in variants():
        declared.setdefault(variant.file, []).append(variant)
    wanted = name and locate(name)[1]
    files = [f for f in source.names() if f.endswith(".cu")] if name is None else files_with(name)
    found = []
    for file in files:
        macros = {}
        for macro, value in (define for variant in declared.get(file, ()) for define in variant.defines):
            macros.setdefault(macro, {})[str(value)] = None
        names = [macro for macro in macros if macro not in shape_macros()]
        others = len(macros) - len(names)
        names = [*names, f"and {others} of the shape"] if others > 1 else list(macros)
        values = tuple(f"{macro}: {', '.join(values)}" for macro, values in macros.items())
        for kernel, parameters in source.declarations(source.packaged(file)).items():
            if wanted in (None, kernel):
                row = (kernel, file, _list(parameters), len(declared.get(file, ())), " ".join(names), values)
                found.append(KernelInfo(*row))
    return Rows(found, hidden=("macros",) if len(files) == 1 else ("parameters", "values"))


def show(name: str) -> None:
    """Prints the source as it stands, overrides included: highlighted, with line numbers."""
    from rich.console import Console

    print = Console().print
    file, kernel = locate(name)
    if kernel is None or kernel in source.overridden_texts():
        print(highlighted(source.text(kernel or file)))
        return
    text = source.text(file)
    start, end = source.span(text, kernel)
    print(highlighted(text[start:end], text.count("\n", 0, start) + 1))


@contextlib.contextmanager
def override(edits: dict[str, str | dict]):
    """Within the block, `edits` ({name: text, or {macro: value}}) replace what the package has.

    A text replaces a file, or one kernel's definition in its file; {macro: value} replaces -D macros of one kernel, or
    adds some. Everything that launches the kernel uses it at once, ModelNew too, and the package's own is back at the
    end of the block; a text that was compiled once is not compiled again.

    The host goes on computing grids from its own value of a macro: one that says how many elements a thread takes
    (WIDTH, ITEMS, tiles) cannot be changed here alone. acc_t, and macros of your own, can.

    Raises ValueError, and changes nothing, for an unknown name or macro, and for a text whose kernels are not those of
    the original, with the same parameters; TypeError for edits of another kind; RuntimeError while another thread is
    inside such a block, whose end would undo them. KernelCompileError comes with the first launch; it names the line of
    the text.
    """
    with source.override(*_checked(edits)):
        yield


def edit(edits: dict[str, str | dict]) -> None:
    """`override` that lasts until `reset`, or to the end of an `override` block around it; the same errors."""
    source.set_overrides(*source.merged(*_checked(edits)))


def reset(*names: str) -> None:
    """Takes back the edits of these names; without any, all. ValueError for a name that has none."""
    texts, constants = source.overrides()
    for name in names:
        key = _key(name)
        if key not in source.overridden():
            edited = ", ".join(sorted(source.overridden())) or "nothing"
            raise ValueError(f"{name} is not edited; edited at present: {edited}")
        texts.pop(key, None)
        constants.pop(key, None)
    source.set_overrides(*((texts, constants) if names else ({}, {})))


def attributes(
    name: str, arch: str | None = None, *, block: int | None = None, shared_bytes: int = 0, **macros: str | int
) -> Rows:
    """Registers, local and shared memory, and occupancy, of every variant of a kernel, or of all kernels of a file.

    arch: "sm_80", ...: compiled by NVRTC for that architecture; no GPU is needed. None: as CuPy compiled it for the
        current GPU, or, without one, for DEFAULT_ARCH.
    block: threads in a block, for the occupancy. Default: the most that __launch_bounds__ allows, else 256.
    shared_bytes: dynamic shared memory per block, for the occupancy.
    macros: variants that have these values only: attributes("tanh_forward", scalar_t="float").
    Variants with wgmma instructions are listed for "sm_90" if there is an NVRTC of CUDA 12 or newer.
    Edits in force count. Raises ValueError for an unknown name or arch, or if no variant fits; BackendError without
    NVRTC.
    """
    measure = _of_gpu if arch is None and _has_gpu() else _of_nvrtc
    arch = _checked_arch(arch)
    if not (block is None or 0 < block <= MAX_THREADS):
        raise ValueError(f"block must be 1 to {MAX_THREADS} threads, received {block}")
    found = [v.kernel(kernel) for v, names in _matching(name, arch, macros) for kernel in names]
    found = list(map(source.in_force, found))
    words, common = told_apart([kernel.defines for kernel in found])
    rows = [measure(kernel, arch, block, shared_bytes)._replace(macros=word) for kernel, word in zip(found, words)]
    return Rows(rows, caption=", ".join(filter(None, (arch, common))), hidden=() if any(words) else ("macros",))


def told_apart(defines) -> tuple[list[str], str]:
    """From several lists of macros: of each list, the macros that not all lists share; and those that all share."""
    shared = set.intersection(*map(set, defines))

    def words(macros, wanted):
        return " ".join(f"{k}={v}" for k, v in macros if ((k, v) in shared) == wanted)

    return [words(macros, False) for macros in defines], words(defines[0], True)


def ptx(name: str, arch: str | None = None, **macros: str | int) -> str:
    """PTX of the first variant of a kernel (of a file: of all its kernels) that has these macros, by NVRTC."""
    kernel, arch = _first(name, arch, macros)
    text = nvrtc.compile_ptx(kernel if kernel.name else kernel.variant, arch)
    if not kernel.name:
        return text
    head, *parts = re.split(r"(?=^\s*// \.globl\s+\w+$)", text, flags=re.MULTILINE)
    return head + next(p for p in parts if re.match(rf"\s*// \.globl\s+{kernel.name}$", p, re.MULTILINE))


def sass(name: str, arch: str | None = None, **macros: str | int) -> str:
    """Machine code of what `ptx` shows. BackendError if there is no nvdisasm on this machine."""
    tool = _disassembler()
    kernel, arch = _first(name, arch, macros)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(nvrtc.compile_variant(kernel if kernel.name else kernel.variant, arch)[0])
        done = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise BackendError(f"{tool} cannot read code for {arch}: {done.stderr.strip()}")
    if not kernel.name:
        return done.stdout
    parts = re.split(r"(?=^//-+ \.text\.)", done.stdout, flags=re.MULTILINE)
    return next(p for p in parts if re.match(rf"//-+ \.text\.{kernel.name}\b", p))


def locate(name: str) -> tuple[str, str | None]:
    """(file, kernel) of a name, the kernel None if it is a file's. ValueError, with close matches, if it is neither."""
    if not isinstance(name, str):
        raise TypeError(f"a kernel or file is named by a str, such as 'tanh_forward'; received {name!r}")
    files = source.names()
    known = {kernel: file for file in files for kernel in source.packaged_kernels(file)}
    if name in known:
        return known[name], name
    for file in (name, f"{name}.cu"):
        if file in files:
            return file, None
    close = difflib.get_close_matches(name, [*known, *files], n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}? " if close else ""
    raise ValueError(f"no kernel and no file is called {name!r}; {hint}cupy_kernels.kernels() lists all")


def files_with(name: str) -> list[str]:
    """The .cu files whose compiled text a change of `name` changes: its own, or all that include a header."""
    file, _ = locate(name)
    if file.endswith(".cu"):
        return [file]
    return [f for f in source.names() if f.endswith(".cu") and f'#line 1 "{file}"' in source.expanded(f)]


@contextlib.contextmanager
def unedited():
    """Within the block the package's own kernels run, whatever is edited."""
    with source.override({}):
        reset()
        yield


def _checked_arch(arch):
    """`arch`, or `default_arch()` for None. ValueError for an architecture that NVRTC does not know."""
    if arch is None:
        return default_arch()
    known = nvrtc.architectures()
    if str(arch).removesuffix("a") not in known:
        raise ValueError(f"NVRTC {nvrtc.version()} compiles for {', '.join(known)}; received {arch!r}")
    return arch


def default_arch() -> str:
    """The current GPU's architecture, or DEFAULT_ARCH."""
    if not _has_gpu():
        return DEFAULT_ARCH
    return f"sm_{compiler.cupy().cuda.Device().compute_capability}"


def occupancy(used: nvrtc.Resources, block: int, shared_bytes: int, arch: str) -> tuple[int, float] | None:
    """(blocks, share of the threads) that a multiprocessor of `arch` holds; None for one that is not known here."""
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


def _key(name):
    file, kernel = locate(name)
    return kernel or file


def _checked(edits):
    """(texts, constants) of edits. ValueError for what cannot be meant."""
    if not isinstance(edits, dict):
        raise TypeError(f"edits are {{name: text}} or {{kernel: {{macro: value}}}}, received {type(edits).__name__}")
    texts, constants = {}, {}
    for name, value in edits.items():
        file, kernel = locate(name)
        if isinstance(value, str):
            _check_entry_points(file, kernel, value)
            texts[kernel or file] = value
        elif isinstance(value, dict):
            if kernel is None:
                raise ValueError(f"macros are changed for a kernel, one of {', '.join(source.packaged_kernels(file))}")
            _check_macros(file, kernel, value)
            constants[kernel] = value
        else:
            raise TypeError(f"{name}: an edit is a text or {{macro: value}}, received {type(value).__name__}")
    return texts, constants


def _check_entry_points(file, kernel, text):
    original = source.declarations(source.packaged(file))
    expected = {kernel: original[kernel]} if kernel else original
    received = source.declarations(text)
    missing = [name for name in expected if name not in received]
    if missing:
        there = f"; it has {', '.join(received)}" if received else ""
        raise ValueError(
            f"the text for {kernel or file} lacks the kernel {', '.join(missing)}{there}. It must define\n"
            + "\n".join(f'    extern "C" __global__ void {n}({_list(p)})' for n, p in expected.items())
        )
    if unfinished := source.unfinished(text):
        raise ValueError(f"the text for {kernel or file} lacks the closing brace of {', '.join(unfinished)}")
    others = [name for name in received if kernel and name != kernel and name in original]
    if others:
        raise ValueError(f"the text for the kernel {kernel} also defines {', '.join(others)}: edit {file} for several")
    for name, parameters in expected.items():
        problem = _difference(parameters, received[name])
        if problem:
            raise ValueError(
                f"{name}: {problem}. The host passes what the original takes:\n"
                f'    extern "C" __global__ void {name}({_list(parameters)})'
            )


def _difference(expected, received):
    if len(expected) != len(received):
        return f"the text declares {len(received)} parameters, not {len(expected)}"
    for i, (wanted, found) in enumerate(zip(expected, received), 1):
        if wanted[0] != found[0]:
            return f"parameter {i} is {' '.join(found)}, not {' '.join(wanted)}"
    return None


def _check_macros(file, kernel, macros):
    from .variants import variants

    known = {k for v in variants() if v.file == file for k, _ in v.defines}
    words = set(re.findall(r"\w+", source.expanded(file)))
    for name, value in macros.items():
        if name not in known and name not in words:
            raise ValueError(
                f"{kernel} has no macro {name!r}: it has {', '.join(sorted(known))}, and those its text uses"
            )
        if not isinstance(value, (str, int)):
            raise TypeError(f"{kernel}: the macro {name} is a str or an int, received {value!r}")


def _list(parameters):
    return ", ".join(" ".join(p) for p in parameters)


def _matching(name, arch, macros):
    """(variant, names of its kernels) for each variant of a name that has these macros and is for `arch`."""
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
    """(Kernel, arch) of the first variant; the kernel's name is empty for a file."""
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
    """The kernel's, compiled once for a text."""
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
    start, _ = source.span(text, kernel.name)
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
            "no nvdisasm found, which turns a kernel's binary into text: pip install nvidia-cuda-nvdisasm, or put the "
            "bin folder of a CUDA toolkit in PATH. ptx() needs neither"
        )
    return tool
