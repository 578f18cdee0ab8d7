"""The magics `%%cu`, `%cu_text` and `%cu_reset` for IPython and notebooks, loaded by `%load_ext modelnew`.

A cell contains a kernel's text. `%%cu` checks within seconds whether it is right, and on a GPU whether it is faster.
"""

import contextlib
import math
import os
import time
from collections import Counter
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
from cupy_kernels.launch import observed

from . import checks, environment
from .interop import compile_together
from .parity import Row
from .timing import measure_launches

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}
SECONDS = {"cpu": 3.0, "cuda": 0.7}  # after which `judge` begins no further check

# {(name, device, images): {check: the edited kernels that it launched}}, for what to check first and compile together
_known = {}


class _Check(NamedTuple):
    dtype: str
    case: checks.Case
    size: str = ""  # one of `checks.SIZES`


class Time(NamedTuple):
    """Milliseconds of one launch of a kernel, with the edited text and with the package's own.

    macros: those that distinguish its variants.
    """

    kernel: str
    macros: str
    edited: float
    original: float


class Verdict(NamedTuple):
    """The result of `judge`: a row for each compared result, and a time for each launched kernel.

    unchecked: the checks that did not fit into the time, such as "float64 odd" or "float32 (2 of 7 checks)".
    """

    device: torch.device
    rows: list[Row]
    times: list[Time]
    unchecked: list[str]

    @property
    def right(self) -> bool:
        """Whether every compared result is within the tolerance policy, see `modelnew.parity`."""
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

    The edit ends with the call.

    name: a kernel, "tanh_forward", or a file, "tanh.cu".
    text: CUDA C.
    dtypes: names in DTYPES that are checked first; by default float32. Each kernel has a check in them, whatever the
        time: on a GPU all checks of the first text of a name, and for later ones a check that launches it.
    device: "cuda", "cuda:1", ... or "cpu", the emulator; by default the GPU, if one is usable.
    images: batch size of the checks on a GPU; by default the model's, if memory allows.
    seconds: time from the start, in seconds, in which further checks may begin: odd and empty sizes, and the other
        dtypes. Default: SECONDS of the device. math.inf: all checks.

    Raises ValueError for an unknown name, dtype or device, for images below 1, and for a text with other entry points;
    KernelCompileError, EmulatorError, and BackendError if no kernel can run.
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
        files, launches, rows, compiled = tinker.files_with(name), {}, [], set()
        known = _known.setdefault((name, device, images), {})

        def missing(some):
            """Kernels that these checks launch and that are not compiled."""
            return {kernel for check in some for kernel in known.get(check, ())} - compiled

        def run(check, kept):
            large = check.dtype in required and not check.size
            launched = {}
            observer = observed(lambda started, *arguments: launched.setdefault(started, arguments))
            with observer, _order_of_threads(check.size):
                rows.extend(
                    checks.compare(check.case, DTYPES[check.dtype], device, images if large else None, check.size)
                )
            own = {k: v for k, v in launched.items() if k.file in files and kernel in (None, k.name)}
            known[check] = frozenset(own)
            compiled.update(own)
            kept.update({**own, **kept})

        cases = checks.cases(files)
        first, *further = _batches(cases, required, known, all_required=device.type == "cpu")
        began, kernels = time.perf_counter(), missing(first)
        compile_together(kernels, device)
        each = (time.perf_counter() - began) / max(len(kernels), 1)
        for check in first:
            run(check, launches)
        if not launches:
            raise ValueError(
                f"no check launches {kernel or file} in {', '.join(required)}; those of {', '.join(files)} are "
                f"{', '.join(case.what for case in cases) or 'none: add one, see modelnew/cases.py'}"
            )
        slowest, whole, unchecked = 0.0, time.perf_counter() - start, []
        for batch in further if all(row.ok for row in rows) else ():
            kernels = missing(batch)
            if time.perf_counter() - start + each * len(kernels) + slowest <= seconds:
                compile_together(kernels, device)
                compiled.update(kernels)
            for check in batch:
                began = time.perf_counter()
                # A check of which nothing is known compiles kernels, as the first ones did.
                expected = slowest if check.size or check in known else max(slowest, whole)
                if missing([check]) or began - start + expected > seconds:
                    unchecked.append(check)
                elif all(row.ok for row in rows):
                    run(check, {})
                    slowest = max(slowest, time.perf_counter() - began)
        verdict = Verdict(device, rows, [], _described(unchecked, len(cases)))
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


@contextlib.contextmanager
def _order_of_threads(size):
    """Odd sizes run in another order on the emulator: where kernels' reads are UNCHECKED, only results show a race."""
    if size != "odd" or "CUPY_KERNELS_SEED" in os.environ:
        yield
        return
    os.environ["CUPY_KERNELS_SEED"] = "1"
    try:
        yield
    finally:
        del os.environ["CUPY_KERNELS_SEED"]


def _batches(cases, required, known, all_required) -> list[list[_Check]]:
    """The checks in batches: what must run, then what runs if there is time, the most telling first.

    First, each kernel is checked once in the required dtypes, then at odd sizes, then in the other dtypes. known: the
    kernels that each check launched for an earlier text; all checks of which that is not known are among the first.
    all_required: whether all checks in the required dtypes must run.
    """
    others = [dtype for dtype in DTYPES if dtype not in required]

    def once(dtype):
        seen, chosen = set(), []
        for check in (_Check(dtype, case) for case in cases):
            names = {kernel.name for kernel in known.get(check, ())}
            if check not in known or names - seen:
                chosen.append(check)
                seen |= names
        return chosen

    def every(dtypes, size=""):
        return [_Check(dtype, case, size) for dtype in dtypes for case in cases]

    must = every(required) if all_required else [check for dtype in required for check in once(dtype)]
    batches = [must, [check._replace(size="odd") for check in must], *map(once, others), every(required)]
    batches += [every(required, size) for size in ("odd", "empty")] + [every([dtype]) for dtype in others]
    batches += [every(others, size) for size in ("odd", "empty")]
    before = set()
    return [[c for c in batch if c not in before and not before.add(c)] for batch in batches]


def _described(unchecked, cases) -> list[str]:
    """Each dtype and size with checks that did not run, as "float64 odd" or "float32 empty (2 of 7 checks)"."""
    counts = Counter(f"{check.dtype} {check.size}".strip() for check in unchecked)
    return [what if count == cases else f"{what} ({count} of {cases} checks)" for what, count in counts.items()]


def _told_apart(kernels) -> dict:
    """{kernel: the macros that distinguish it from other variants of its name}"""
    words = {}
    for name in {kernel.name for kernel in kernels}:
        namesakes = [kernel for kernel in kernels if kernel.name == name]
        words.update(zip(namesakes, inspection.told_apart([kernel.defines for kernel in namesakes])[0]))
    return words


def table(verdict: Verdict) -> Table:
    """The verdict as a table: for each check the worst result beside PyTorch's, and all wrong results."""
    shown = Table(box=box.SIMPLE_HEAD, caption=_caption(verdict), caption_justify="left")
    for column in ("check", "edited", "reference", "speedup", "results"):
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
        text += "\nRaces, accesses out of bounds, barriers: looked for in every launch, none found."
        text += " Not checked: large sizes"
    else:
        text += "\nNot checked: races and accesses out of bounds (--device cpu looks for them)"
    return text + (f"; without --all also {', '.join(verdict.unchecked)}." if verdict.unchecked else ".")


@magics_class
class KernelMagics(Magics):
    """The magics of `%load_ext modelnew`."""

    @magic_arguments()
    @argument("kernel", help="the kernel (tanh_forward) or file (tanh.cu) that the cell replaces")
    @argument(
        "--dtype", action="append", choices=DTYPES, help="check and time in this dtype first; may be repeated [float32]"
    )
    @argument("--device", help="cuda, cuda:1, ... or cpu, which means the emulator [the GPU, if one is usable]")
    @argument("--images", type=int, help="batch size of the checks on a GPU")
    @argument("--seconds", type=float, help="time limit for further dtypes, odd and empty sizes [3, GPU 0.7]")
    @argument("--all", action="store_true", help="check all dtypes and sizes, however long it takes")
    @cell_magic
    def cu(self, line, cell):
        """Replace a kernel by the cell's CUDA C: compile it, check it against PyTorch, time it.

        If the cell does not compile, or if its results are wrong, nothing changes. Otherwise the new kernel is in force
        in the whole process, until `%cu_reset`. `%cu_text tanh_forward` gives a cell to start from.
        """
        try:
            args = parse_argstring(self.cu, line)
            options = {"device": args.device, "images": args.images, "seconds": math.inf if args.all else args.seconds}
            verdict = judge(args.kernel, cell, dtypes=args.dtype, **options)
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"{error}\n{_unchanged()}") from None
        print(table(verdict))
        if not verdict.right:
            wrong = ", ".join(f"{row.what} in {row.cls}" for row in verdict.rows if not row.ok)
            raise UsageError(f"{args.kernel} is wrong: {wrong}\n{_unchanged()}")
        cupy_kernels.edit({args.kernel: cell})
        print(f"{args.kernel} is now in force, in the whole process; %cu_reset {args.kernel} takes it back.")

    @line_magic
    def cu_text(self, line):
        """Put the current text of a kernel or file into a new cell: `%cu_text tanh_forward`."""
        try:
            text = cupy_kernels.text(line.strip())
        except ValueError as error:
            raise UsageError(str(error)) from None
        self.shell.set_next_input(f"%%cu {line.strip()}\n{text}")

    @line_magic
    def cu_reset(self, line):
        """Undo edits: `%cu_reset` all, `%cu_reset tanh_forward` one."""
        try:
            cupy_kernels.reset(*line.split())
        except (ValueError, RuntimeError) as error:
            raise UsageError(str(error)) from None


def _unchanged():
    edited = cupy_kernels.edited()
    return f"Nothing was changed. In force from before: {', '.join(edited) if edited else 'no edit'}."
