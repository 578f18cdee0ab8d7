"""The READMEs and the guide: code runs, commands and links exist, generated parts are what the records say."""

import configparser
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from click.testing import CliRunner

from cupy_kernels import source
from modelnew import __main__ as cli
from tools import readme

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
GUIDE = [README, *sorted((ROOT / "docs" / "guide").glob("*.md"))]
MEASURED = ROOT / "benchmarks" / "README.md"
PAGES = [*GUIDE, MEASURED, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
NEEDS_GPU = "<!-- needs a GPU -->"
MARKED = "# A\n" + "\nold\n".join(readme.MARKERS) + "\n"
EMPTY = "".join(map(MARKED.format, readme.PARTS, readme.PARTS)) + "the end\n"


class Block(NamedTuple):
    line: int
    before: str
    language: str
    text: str


def blocks(text):
    lines, found, opened = text.splitlines(), [], None
    for number, line in enumerate(lines):
        if line.startswith("```") and opened is None:
            opened = number
        elif line == "```":
            content = "\n".join(lines[opened + 1 : number])
            found.append(Block(opened + 1, lines[opened - 1], lines[opened][3:], content))
            opened = None
    assert opened is None, f"the block at line {opened} does not end"
    return found


BLOCKS = [(page, block) for page in GUIDE for block in blocks(TEXTS[page])]


def python_blocks():
    for page, block in BLOCKS:
        if block.language == "python":
            no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
            marks = [pytest.mark.gpu, no_gpu] if block.before == NEEDS_GPU else []
            yield pytest.param(page, block, marks=marks, id=f"{page.stem}_line_{block.line}")


@pytest.mark.parametrize(("page", "block"), list(python_blocks()))
def test_python(page, block, capsys):
    exec(compile("\n" * block.line + block.text, str(page), "exec"), {"__name__": "__main__"})


def test_languages():
    assert {block.language for _, block in BLOCKS} == {"python", "bash", "mermaid"}
    marked = sum(block.before == NEEDS_GPU and block.language == "python" for _, block in BLOCKS)
    assert sum(TEXTS[page].count(NEEDS_GPU) for page in GUIDE) == marked


def test_length():
    """What a stranger reads in a few minutes; the rest is in the guide."""
    assert len(TEXTS[README].splitlines()) <= 200


def commands():
    """Words of every command in a bash block, and in code of the text that begins like one."""
    lines = [line for _, block in BLOCKS if block.language == "bash" for line in block.text.splitlines()]
    codes = [code for page in (*GUIDE, MEASURED) for code in re.findall(r"`([^`\n]+)`", TEXTS[page])]
    lines += [code for code in codes if code.startswith(("python3 ", "make "))]
    return [shlex.split(part) for line in lines for part in line.split("&&")]


def test_commands():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert commands()
    for words in commands():
        if words[:4] == ["python3", "-m", "pip", "install"]:
            assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).is_file()
            assert set(re.search(r"\.\[(.+)\]", words[-1])[1].split(",")) <= extras, words
        elif words[:3] == ["python3", "-m", "modelnew"]:
            result = CliRunner().invoke(cli.main, [*words[3:], "--help"])
            assert result.exit_code == 0, (words, result.output)
        elif words[:2] == ["python3", "-m"] and words[2].startswith("tools."):
            result = CliRunner().invoke(importlib.import_module(words[2]).command, [*words[3:], "--help"])
            assert result.exit_code == 0, (words, result.output)
        elif words[0] == "make":
            assert words[1] in targets
        elif words[1] == "-m":
            assert words[:3] == ["python3", "-m", "pytest"]
            assert all((ROOT / file).is_file() for file in words[3:]), words
        else:
            assert (ROOT / words[1]).is_file(), words


def test_links():
    for page, text in TEXTS.items():
        links = re.findall(r"\]\(([^)#]+)\)", text)
        assert not [link for link in links if not (link.startswith("https://") or (page.parent / link).exists())], page
    linked = {ROOT / link for link in re.findall(r"\]\(([^)#]+)\)", TEXTS[README])}
    assert linked >= {*PAGES} - {README}


def test_what_ci_runs():
    """.ci/run takes the test command from these lines."""
    assert re.search(
        r"^The tests:\n\n```bash\npython3 -m pip install .+ && python3 -m pytest\n```$", TEXTS[README], re.MULTILINE
    )


def test_is_current():
    result = CliRunner().invoke(readme.command, ["--check"])
    assert result.exit_code == 0, result.output


def test_every_part_is_in_one_text():
    texts = [file.read_text(encoding="utf-8") for file in readme.FILES]
    assert all(sum(readme.MARKERS[0].format(name) in text for text in texts) == 1 for name in readme.PARTS)


def test_the_network_is_as_fast_as_the_notebook_says():
    notebook = json.loads((ROOT / "examples" / "05_your_network.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    printed = "".join("".join(output.get("text", ())) for output in outputs)
    times = [re.search(rf"^{what} .* ([\d.]+)x$", printed, re.MULTILINE)[1] for what in ("forward", "training step")]
    forward, step = (f"{float(x):.1f} times as long" for x in times)
    text = " ".join(TEXTS[README].split())
    assert f"PyTorch takes {forward} forward and {step} for a step" in text


def row(what="step", who="modelnew", ms=1.0, n=512, **options):
    found = {"what": what, "class": "tf32", "n": n, "who": who, "layout": "nchw", "ms": ms, "ms_min": ms, "ms_max": ms}
    return {**found, "peak_mb": 100.4, **options}


VERSIONS = {"gpu": "NVIDIA A", "torch": "2.11", "cupy": "13.6", "nvrtc": "11.8", "driver": "580"}
BENCH = {
    "command": "python3 -m modelnew bench --trials 20",
    "versions": VERSIONS,
    "digest": "0123456789abcdef",
    "trials": 20,
    "calls_of_few": 50,
    "shape": {"in_channels": 64, "out_channels": 128, "kernel_size": 5, "stride": 1, "padding": 1, "size": 32},
    "ceilings": None,
    "rows": [
        row(),
        row(who="eager", ms=3.0, peak_mb=1000.0),
        row(who="compile", layout="nhwc", ms=2.0, peak_mb=500.0),
        row("forward_eval", ms=None),
        row("forward_train", n=1, ms=0.25, peak_mb=None),
        row("forward_train", "modelnew-graph", n=1, ms=0.05),
        row("forward_train", "eager", n=1, ms=0.125),
        row("forward_train", "eager-graph", n=1, ms=0.075),
        row("forward_train", "eager-graph", n=1, ms=0.0625, layout="nhwc"),
        row(n=4096, ms=7.5),
        row(who="eager", n=4096, ms=30.0),
        row("conv_forward"),
        row("compiled_step", n=1),
        row("compiled_step", "modelnew-compile-reduce-overhead", n=1, ms=0.5),
        row("startup_cold", ms=4210.0),
        row("startup_warm", ms=660.0),
    ],
}
TRAINING = {
    "command": "python3 -m modelnew training",
    "versions": VERSIONS,
    "digest": "0123456789abcdef",
    "steps": 2,
    "batch": 64,
    "seeds": 3,
    "judged": 5,
    "judgements": [
        {"what": what, "class": cls, "rms": 1.5e-7, "torch_rms": torch_rms, "ok": what == "output"}
        for what, torch_rms in (("output", 3e-7), ("conv_transpose.weight", 1e-7))
        for cls in ("fp32", "tf32")
    ],
    "last": 20,
    "rows": [
        {"who": who, "class": cls, "layout": layout, "loss_last": 0.25, "losses": [1.0 + 1e-4 * (cls == "tf32"), 0.25]}
        for who in ("Model", "ModelNew")
        for cls in ("tf32", "fp32")
        for layout in ("nchw", "nhwc")
    ],
}
TRAINING_AMP = {
    **TRAINING,
    "command": "python3 -m modelnew training --amp",
    "amp": True,
    "judgements": [
        {"what": what, "class": cls, "rms": 1e-3, "torch_rms": 2e-3, "ok": True}
        for what in ("output", "conv_transpose.weight")
        for cls in ("fp16", "bf16")
    ],
    "rows": [{**r, "class": {"tf32": "fp16", "fp32": "bf16"}[r["class"]]} for r in TRAINING["rows"]],
}
LAYERS = {
    "command": "python3 -m modelnew bench --layers",
    "versions": VERSIONS,
    "digest": "0123456789abcdef",
    "trials": 20,
    "rows": [
        {"operator": "Tanh", "case": case, "dtype": "fp16", "layout": layout, "what": what, "ms": 0.02, "eager_ms": ms}
        for case, layout, what, ms in (
            ("a", "nchw", "forward", 0.08),
            ("b", "nchw", "forward", 0.02),
            ("a", "nchw", "step", 0.03),
            ("a", "nhwc", "forward", 0.01),
            ("b", "nhwc", "step", None),
        )
    ],
}
SCALING = {
    "command": "python3 -m modelnew scaling",
    "versions": VERSIONS,
    "digest": "0123456789abcdef",
    "trials": 10,
    "steps": 10,
    "rows": [
        {"who": "modelnew", "what": what, "gpus": gpus, "n": 512, "ms": ms, "added_ms": ms - 1, "scaling": 1 / ms}
        for what, gpus, ms in (("alone", 1, 1.0), ("ddp", 2, 1.25))
    ],
}
KERNELBENCH = {
    "command": "python3 -m tools.kernelbench_eval ../KernelBench",
    "versions": VERSIONS,
    "digest": "0123456789abcdef",
    "commit": "fedcba9876543210",
    "trials": 100,
    "static_errors": ["one", "two"],
    "gradient_errors": {"x": [0.03, 0.02], "batch_norm.bias": [0.01, 0.02]},
    "rows": [
        {"correct": correct, "ms": ms, "reference_ms": 2.0, "speedup": 2 / ms}
        for correct, ms in ((True, 0.4), (False, 0.5))
    ],
}
FUZZ = {
    "command": "python3 -m modelnew fuzz",
    "versions": VERSIONS,
    "digest": "0123456789abcdef",
    "cases": {"tanh": 5, "max_pool2d": 7},
    "failed": 0,
}
PARITY = {"versions": VERSIONS, "digest": "0123456789abcdef", "passed": 1020, "failed": 0, "skipped": 2}


@pytest.fixture
def repository(tmp_path):
    """A folder with README.md and records, and what the command does with it."""
    (tmp_path / "README.md").write_text(EMPTY, encoding="utf-8")
    (tmp_path / "results").mkdir()

    def invoke(*arguments):
        paths = ["--file", str(tmp_path / "README.md"), "--results", str(tmp_path / "results")]
        return CliRunner().invoke(readme.command, [*paths, *arguments])

    return tmp_path, invoke


def test_without_records(repository):
    folder, invoke = repository
    assert invoke("--check").exit_code == 1
    assert invoke().exit_code == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# A\n<!-- speed: written")
    assert text.endswith("<!-- end of suite -->\nthe end\n")
    assert "old" not in text
    assert readme._NO_TIMES in text
    assert readme._NO_SCALING in text
    assert readme._NO_KERNELBENCH in text
    assert readme._NO_LAYERS in text
    assert readme._NO_TRAINING in text
    assert readme._NO_SUITE in text
    assert invoke("--check").exit_code == 0


def test_with_records(repository):
    pytest.importorskip("matplotlib")
    folder, invoke = repository
    (folder / "results" / "bench_a.json").write_text(json.dumps(BENCH), encoding="utf-8")
    mma = {**BENCH, "command": "python3 -m modelnew bench --no-wgmma"}
    (folder / "results" / "bench_a_nvrtc11.8.json").write_text(json.dumps(mma), encoding="utf-8")
    (folder / "results" / "layers_a.json").write_text(json.dumps(LAYERS), encoding="utf-8")
    (folder / "results" / "training_a.json").write_text(json.dumps(TRAINING), encoding="utf-8")
    (folder / "results" / "training_amp_a.json").write_text(json.dumps(TRAINING_AMP), encoding="utf-8")
    (folder / "results" / "parity_a.json").write_text(json.dumps(PARITY), encoding="utf-8")
    (folder / "results" / "scaling_a.json").write_text(json.dumps(SCALING), encoding="utf-8")
    (folder / "results" / "kernelbench_a.json").write_text(json.dumps(KERNELBENCH), encoding="utf-8")
    (folder / "results" / "fuzz_a.json").write_text(json.dumps(FUZZ), encoding="utf-8")
    assert invoke().exit_code == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    where = "NVIDIA A, torch 2.11, CuPy 13.6, NVRTC 11.8, driver 580, kernels `0123456789ab`"
    assert f"{where}, `{BENCH['command']}`. Milliseconds" in text
    assert f"{where}, `{TRAINING['command']}`. After each" in text
    assert f"{where}, `{LAYERS['command']}`. Layers of ours beside PyTorch's at 2 shapes" in text
    assert "| Tanh | fp16 | 2.00x (4.00x) | 1.50x | 0.50x |  |\n" in text
    assert "evaluation (commit fedcba9) of" in text
    assert (
        "process: 1 of 2 find it right. It is as many times as fast as PyTorch: 5.00 (0.4 ms), 4.00 (0.5 ms)," in text
    )
    assert "are at most 1.50 times as far from float64's as PyTorch's. What its static checks report as an" in text
    assert " error: one; two." in text
    assert "median of 20 trials (up to 8 images: of 50 calls each), all in one process" in text
    assert "In a CUDA graph, ModelNew stands beside the fastest of all peers" in text
    assert "\n512 images:\n" in text
    assert "| `step` | tf32 | **1** | 100 | 3 | 3.00x | 2 | compile, nhwc | 500 | 2.00x |\n" in text
    head = r"\n\n\|  \| class .*\n\|---.*\n"
    peer = "0.125 (0.125 to 0.125) | eager, nchw | 100 | 0.50x"
    line = f"| `forward_train` | tf32 | **0.25** (0.25 to 0.25) |  | 0.125 (0.125 to 0.125) | 0.50x | {peer} |\n\n"
    assert re.search(f"\n1 image, host-bound:{head}{re.escape(line)}", text)
    peer = "0.0625 | eager-graph, nhwc | 100 | 1.25x"
    line = f"| `forward_train` | tf32 | **0.05** | 100 | 0.075 | 1.50x | {peer} |\n\n"
    assert re.search(f"\n1 image, in a CUDA graph:{head}{re.escape(line)}", text)
    assert "\n4096 images:\n" not in text
    assert "| | class | 1 | 512 | 4096 |\n" in text
    assert "| `step` | tf32 |  | 1 ms, 2.00x compile | 7.5 ms, 4.00x eager |\n" in text
    assert "| `forward_train` | tf32 | 0.25 ms, 0.50x eager |  |  |\n" in text
    assert "conv_forward" not in text
    faster = "**ModelNew is 3.0 times as fast as PyTorch and 2.0 times as fast as torch.compile:**"
    assert f"{faster} training step, 512 images, with TF32, on one NVIDIA A.\n\n![" in text
    times = "forward, 1 image, with TF32: 0.25 ms; training step, 512 images, with TF32: 1 ms"
    assert f"torch.compile: mode 'default', in the faster memory format. {where}, `{BENCH['command']}`.</sub>" in text
    assert "\n\n<sub>With NVRTC 11.8 alone, which does not compile `wgmma`, the fast matrix instructions of H" in text
    assert f"H200: {times}.</sub>" in text
    assert (
        f"Of older kernels than the present ones, `{source.digest()[:12]}`: bench_a.json, bench_a_nvrtc11.8.js" in text
    )
    assert "PyTorch: eager, NCHW. torch" in text
    assert f"{where.replace('kernels', 'without wgmma, kernels')}, `{mma['command']}`. Milliseconds" in text
    picture = (folder / "results" / "bench_a.svg").read_text(encoding="utf-8")
    assert "](results/bench_a.svg)" in text
    assert re.findall('bold">(.*)<', picture) == ["Forward, 1 image, with TF32", "Training step, 512 images, with TF32"]
    values = re.findall("<text[^>]*>([0-9].*)<", picture)
    assert values == ["0.25 ms", "0.125 ms, 0.50x", "1 ms", "3 ms, 3.00x", "2 ms, 2.00x"]
    widths = [int(width) for width in re.findall('<rect.* width="([0-9]+)"', picture)]
    assert widths[2:] == [round(widths[3] * share) for share in (1 / 3, 1, 2 / 3)]
    assert "| Tanh |  |  | 0.50x to 2.00x | 1.50x |\n" in text
    assert "| | class | 1 image, reduce-overhead |\n|---|---|--:|\n| `step` | tf32 | 0.50x |" in text
    assert "A training step of 512 images on each of 2 GPUs" in text
    assert "| ModelNew | DistributedDataParallel | 1 | 1.25 | +0.25 | 0.80 |\n" in text
    assert f"{where}, `{FUZZ['command']}`: 12 random calls, at least 5 of each of 2 functions" in text
    assert "4.2 s with nothing compiled before, 0.7 s with kernels compiled on disk." in text
    assert "driver 580, kernels `0123456789ab` | 1020 | 0 | 2 |" in text
    assert "After each of the first 5 steps of SGD, from 3 seeds, output" in text
    assert "2 of 4 comparisons pass: ours is at most 1.1 times as far" in text
    assert "explain. At worst the output is 0.50 with TF32 and 0.50 in float32 times as far" in text
    assert "the convolution's weight 1.50 with TF32 and 1.50 in float32, and " in text
    assert "and conv_transpose.weight 1.50 in float32, the most of all.\n\nThen" in text
    assert "demonstration: 2 steps on the same batches of 64; mean loss of the last 20: " in text
    assert "ModelNew 0.250000 with TF32 and 0.250000 in float32." in text
    assert "`python3 -m modelnew training --amp`: under autocast, with a GradScaler. After each" in text
    assert "ModelNew 0.250000 in float16 and 0.250000 in bfloat16." in text
    for name in ("bench_a.png", "training_a.png", "training_amp_a.png"):
        assert f"](results/{name})" in text
        assert (folder / "results" / name).read_bytes().startswith(b"\x89PNG")
    assert invoke("--check").exit_code == 0
    (folder / "results" / "bench_a.svg").write_text(picture.replace("3.00x", "4.00x"), encoding="utf-8")
    assert "bench_a.svg is not what" in invoke("--check").output
    assert invoke().exit_code == 0
    (folder / "results" / "bench_a.png").unlink()
    assert "there is no" in invoke("--check").output
    (folder / "results" / "bench_a.json").unlink()
    assert "run the command without --check" in invoke("--check").output


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"versions": {}}'])
def test_what_is_no_record(repository, content):
    folder, invoke = repository
    (folder / "results" / "bench_a.json").write_text(content, encoding="utf-8")
    result = invoke()
    assert result.exit_code == 1
    assert "is no record" in result.output
    assert (folder / "README.md").read_text(encoding="utf-8") == EMPTY


@pytest.mark.parametrize(
    "text",
    ["# A\n", MARKED.format("colours", "colours"), 2 * MARKED.format("suite", "suite"), MARKED.format("suite", "x")],
)
def test_text_without_markers(repository, text):
    folder, invoke = repository
    (folder / "README.md").write_text(text, encoding="utf-8")
    result = invoke()
    assert result.exit_code == 1
    assert "must" in result.output
