"""`%%cu`, `%cu_text` and `%cu_reset` for IPython and notebooks, which `%load_ext modelnew` loads.

A cell has a kernel's text; `%%cu` says within a second whether it is right and faster.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring
from rich import box, print
from rich.table import Table

import cupy_kernels
from cupy_kernels import inspection, tinker
from cupy_kernels.errors import BackendError, EmulatorError, KernelCompileError
from cupy_kernels.launch import observed

from . import checks, environment
from .interop import compile_together
from .parity import Row
from .timing import measure_launches

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}
SECONDS = {"cpu": 3.0, "cuda": 0.7}  # after which `judge` begins no further check

_known = {}  # kernels that an edit's checks launched: those of the next edit are compiled in parallel


class Time(NamedTuple):
    """Milliseconds of one launch of one kernel, with the edited text and with the package's own.

    macros: those whose values tell its launches apart.
    """

    kernel: str
    macros: str
    edited: float
    original: float


class Verdict(NamedTuple):
    """What `judge` found: a row for each result that was compared, a time for each kernel that was launched.

    unchecked: what there was no time for, "float64" or "float64 odd".
    """

    device: torch.device
    rows: list[Row]
    times: list[Time]
    unchecked: list[str]

    @property
    def right(self) -> bool:
        """Whether every result is as close to the truth as it must be."""
        return all(row.ok for row in self.rows)


def judge(
    name: str,
    text: str,
    *,
    dtypes: Sequence[str] | None = None,
    device: str | None = None,
    images: int | None = None,
    seconds: float | None = None,
) -> Verdict:
    """Compiles `text` in place of a kernel or file, checks all operators that launch it, and times its kernels.

    Nothing stays edited. Operators are checked in `dtypes`, by default float32, at the usual sizes; then, as long as
    `seconds` since the beginning allow (default: SECONDS), at odd and empty ones, and in the dtypes that DTYPES has
    besides. images: batch of the usual sizes on a GPU; by default the model's, where memory allows.
    Raises ValueError for a name, dtype or device that does not exist, no images, and a text with other entry points,
    KernelCompileError, EmulatorError, and BackendError where no kernel can run.
    """
    start, required = time.perf_counter(), tuple(dtypes or ("float32",))
    unknown = [dtype for dtype in required if dtype not in DTYPES]
    if unknown:
        raise ValueError(f"kernels are checked in {', '.join(DTYPES)}; received {', '.join(unknown)}")
    if images is not None and images < 1:
        raise ValueError(f"images must be 1 or more, received {images}")
    file, kernel = tinker.locate(name)
    with cupy_kernels.override({name: text}):
        device = environment.device(device)
        images = images if images and device.type == "cuda" else checks.images_for(device)
        seconds = SECONDS[device.type] if seconds is None else seconds
        files, launches, rows = tinker.files_with(name), {}, []
        key = name, required, device, images
        compile_together(_known.get(key, ()), device)

        def keep(started, *arguments):
            if started.file in files and kernel in (None, started.name):
                launches.setdefault(started, arguments)

        cases = checks.cases(files)
        for dtype in required:
            for case in cases:
                with observed(keep):
                    rows += checks.compare(case, DTYPES[dtype], device, images)
        if not launches:
            raise ValueError(
                f"no check launches {kernel or file} in {', '.join(required)}; those of {', '.join(files)} are "
                f"{', '.join(case.what for case in cases) or 'none: add one, see modelnew/cases.py'}"
            )
        _known[key] = list(launches)
        unchecked, slowest, first = [], 0.0, time.perf_counter() - start
        for dtype, size in _further(required):
            for case in cases if all(row.ok for row in rows) else ():
                began = time.perf_counter()
                expected = (
                    slowest if size else max(slowest, first)
                )  # a dtype is compiled first, as the required one was
                if began - start + expected > seconds:
                    unchecked.append(f"{dtype} {size}".strip())
                    break
                rows += checks.compare(case, DTYPES[dtype], device, None, size)
                slowest = max(slowest, time.perf_counter() - began)
        verdict = Verdict(device, rows, [], unchecked)
        if verdict.right:
            calls = [(started, *arguments) for started, arguments in launches.items()]
            edited = measure_launches(calls, device)
            with tinker.unedited():
                compile_together(launches, device)
                original = measure_launches(calls, device)
            words = _told_apart(launches)
            for started, *times in zip(launches, edited, original):
                verdict.times.append(Time(started.name, words[started], *(t.median for t in times)))
    return verdict


def _further(required):
    """(dtype, size) of the checks that come if there is time, the most telling first; sizes of `checks.SIZES`."""
    others = [dtype for dtype in DTYPES if dtype not in required]
    for size in ("odd", "empty"):
        yield from ((dtype, size) for dtype in required)
    for size in ("", "odd", "empty"):
        yield from ((dtype, size) for dtype in others)


def _told_apart(kernels) -> dict:
    """{kernel: the macros that tell it from those of its name}"""
    words = {}
    for name in {kernel.name for kernel in kernels}:
        namesakes = [kernel for kernel in kernels if kernel.name == name]
        words.update(zip(namesakes, inspection.told_apart([kernel.defines for kernel in namesakes])[0]))
    return words


def table(verdict: Verdict) -> Table:
    """The verdict as one table: of each check the result that is worst beside PyTorch's, and all that are wrong."""
    shown = Table(box=box.SIMPLE_HEAD, caption=_caption(verdict), caption_justify="left")
    for column in ("", "edited", "reference", "", ""):
        shown.add_column(column, justify="left" if not shown.columns else "right")
    checked = {}
    for row in verdict.rows:
        checked.setdefault((row.what.partition(":")[0], row.cls), []).append(row)
    for (check, dtype), rows in checked.items():
        for row in [row for row in rows if not row.ok] or [max(rows, key=lambda row: row.ratio)]:
            what = f"{check}, {dtype}: {row.what.partition(': ')[2]}"
            judged = f"[green]{len(rows)} ok[/]" if row.ok else "[red]FAIL[/]"
            shown.add_row(what, f"{row.ours.rms:.1e}", f"{row.torch.rms:.1e}", "", judged)
    shown.add_section()
    for kernel, macros, edited, original in verdict.times:
        shown.add_row(
            f"{kernel} [dim]{macros}[/]", f"{edited:.3g} ms", f"{original:.3g} ms", f"{original / edited:.2f}x"
        )
    return shown


def _caption(verdict):
    text = "Errors (rms) against float64, beside PyTorch's; times beside the package's kernel."
    if verdict.device.type == "cpu":
        text += " Small shapes on the emulator: its times say nothing about a GPU."
        text += "\nRaces, accesses out of bounds, barriers: looked for in every launch, none found. Not checked: "
        unchecked = [*verdict.unchecked, "large sizes"]
    else:
        text += "\nNot checked: "
        unchecked = [*verdict.unchecked, "races and accesses out of bounds (--device cpu looks for them)"]
    return text + ", ".join(unchecked) + ("; --seconds 60 takes more time." if verdict.unchecked else ".")


@magics_class
class KernelMagics(Magics):
    """The magics of `%load_ext modelnew`."""

    @magic_arguments()
    @argument("kernel", help="a kernel (tanh_forward), whose definition the cell replaces, or a file (tanh.cu)")
    @argument(
        "--dtype", action="append", choices=DTYPES, help="check and time in this dtype first; may be repeated [float32]"
    )
    @argument("--device", help="cuda, cuda:1, ... or cpu, the emulator [the GPU, if one is usable]")
    @argument("--images", type=int, help="images in a GPU's checks")
    @argument("--seconds", type=float, help="time for checks in other dtypes, and of odd and empty sizes [3, GPU 0.7]")
    @cell_magic
    def cu(self, line, cell):
        """Put the cell's CUDA C in place of a kernel: compile it, check it against PyTorch, time it.

        A cell that does not compile, or whose results are wrong, changes nothing: what was there goes on. One that is
        right is in force at once, for everything in this process, until `%cu_reset`. `%cu_text tanh_forward` gives a
        cell to begin with.
        """
        args = parse_argstring(self.cu, line)
        options = {"device": args.device, "images": args.images, "seconds": args.seconds}
        try:
            verdict = judge(args.kernel, cell, dtypes=args.dtype, **options)
        except (ValueError, BackendError, EmulatorError, KernelCompileError) as error:
            raise UsageError(f"{error}\n{_unchanged()}") from None
        print(table(verdict))
        if not verdict.right:
            wrong = ", ".join(row.what for row in verdict.rows if not row.ok)
            raise UsageError(f"{args.kernel} is wrong: {wrong}\n{_unchanged()}")
        cupy_kernels.edit({args.kernel: cell})
        print(f"{args.kernel} is now in force, in the whole process; %cu_reset {args.kernel} takes it back.")

    @line_magic
    def cu_text(self, line):
        """Put a kernel's text, or a file's, as it stands into a new cell to edit: `%cu_text tanh_forward`."""
        try:
            text = cupy_kernels.text(line.strip())
        except ValueError as error:
            raise UsageError(str(error)) from None
        self.shell.set_next_input(f"%%cu {line.strip()}\n{text}")

    @line_magic
    def cu_reset(self, line):
        """Put the package's own kernels back: `%cu_reset` all, `%cu_reset tanh_forward` one."""
        try:
            cupy_kernels.reset(*line.split())
        except ValueError as error:
            raise UsageError(str(error)) from None


def _unchanged():
    return f"Nothing was changed. Edited at present: {', '.join(cupy_kernels.edited()) or 'nothing'}."
