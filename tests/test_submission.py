"""examples/kernelbench_submission.py: is current, has KernelBench's form, and computes what the package computes."""

import ast
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import modelnew
from cupy_kernels import emulator, nvrtc, source
from cupy_kernels.errors import BackendError
from cupy_kernels.variants import variants
from modelnew import parity
from tools import kernelbench_eval, submission

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "examples" / "kernelbench_submission.py"
SMALL = [16, 32, 3, 1, 1, 1, 4]

# What KernelBench does, in a process that has no package to import.
HARNESS = """
import sys
sys.modules.update(dict.fromkeys(("modelnew", "cupy_kernels")))
import importlib.util, torch
spec = importlib.util.spec_from_file_location("submission", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
torch.manual_seed(42)
inputs = [x.cuda() for x in module.get_inputs()]
with torch.no_grad():
    torch.manual_seed(42)
    model = module.ModelNew(*module.get_init_inputs()).to("cuda")
    print(model(*inputs).double().sum().item())
"""


# A problem file and KernelBench's modules, as far as the evaluation needs them.
PROBLEM = """
from modelnew.model import Model, get_init_inputs, get_inputs
"""
KERNELBENCH = {
    "__init__": "import openai",
    "kernel_static_checker": "def validate_kernel_static(*_): return False, ['an error'], []",
    "eval": """
from types import SimpleNamespace

def eval_kernel_against_ref(problem, submission, **options):
    assert "Model" in problem and "ModelNew" in submission and options["measure_performance"]
    return SimpleNamespace(correctness=True, runtime=0.4, ref_runtime=2.0)
""",
}


@pytest.fixture(scope="module")
def written():
    spec = importlib.util.spec_from_file_location("kernelbench_submission", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runnable(written, device, monkeypatch):
    """The file; on the CPU the emulator runs the package's kernels in place of the file's, which are for GPUs alone."""
    if device == "cuda":
        yield written
        return

    def launch(kernel, *args):
        recorded(kernel, *args)
        file = source.add("image_sums", written.IMAGE_SUMS) if kernel.file == "image_sums.cu" else kernel.file
        step = written.launched.pop()
        written.launched.append(step._replace(kernel=source.Kernel(file, *kernel[1:])))

    def choose(_, tf32):
        return written.Choice("tf32" if tf32 else "fp32", False, 227 * 1024, 132, False, None)

    recorded = written.launch
    changes = {"Backend": lambda _: emulator.backend, "launch": launch, "choose": choose, "recorded": {}}
    changes["current_stream"] = lambda device: None
    for name, value in changes.items():
        monkeypatch.setattr(written, name, value)
    yield written


def test_is_current():
    assert FILE.read_text(encoding="utf-8") == submission.generate(), "run: python3 -m tools.submission"


def test_form():
    text = submission.generate()
    assert not re.search(r"\b(try|except|pass)\b|torch\.nn\.|nn\.functional", text)
    imported = set()
    for node in ast.walk(ast.parse(text)):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported.update(name.partition(".")[0] for name in names)
    assert imported - set(sys.stdlib_module_names) == {"torch", "numpy", "cupy"}


@pytest.mark.parametrize("file", re.findall(r'^    "(\w+\.cu)": r"""', FILE.read_text(), re.MULTILINE))
def test_a_gpu_gets_the_packages_kernels(written, file):
    """The file leaves out comments, and branches of the preprocessor that no such GPU takes."""
    chosen = {variant.architecture: variant for variant in variants() if variant.file == file}
    if not nvrtc.of_wgmma():
        chosen.pop("sm_90a", None)
    for architecture, variant in chosen.items():
        compiled = functools.partial(nvrtc.compile_ptx, variant, architecture or "compute_90")
        try:
            expected = compiled()
        except BackendError:
            pytest.skip("needs NVRTC")
        with source.override(written.KERNELS):
            assert compiled() == expected


def test_parameters_and_inputs(written):
    assert written.get_init_inputs() == modelnew.get_init_inputs()
    torch.manual_seed(3)
    reference = modelnew.Model(*written.get_init_inputs(), device="cpu")
    torch.manual_seed(3)
    model = written.ModelNew(*written.get_init_inputs())
    for (name, ours), (expected, theirs) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert name == expected
        assert torch.equal(ours, theirs)
    model.load_state_dict(reference.state_dict())
    (x,) = written.get_inputs()
    assert x.shape == (512, 64, 32, 32)
    assert x.dtype == torch.float32


def results(model, x, dy):
    x = x.clone().requires_grad_()
    y = model(x)
    gradients = torch.autograd.grad(y, [x, *model.parameters()], dy)
    with torch.no_grad():
        evaluated = model.eval()(x), model.train()(x)
    return [y, *gradients, *evaluated, *(b.clone() for b in model.buffers())]


# Of `results`. The file centres x at other sums of the first image, which changes the rounding errors.
WEIGHT_GRADIENT = 2


@pytest.mark.parametrize("cls", ["fp32", "tf32"])
def test_equals_the_package(runnable, device, cls):
    small = device == "cpu"
    init, x = (SMALL, torch.rand(3, 16, 7, 6)) if small else (modelnew.get_init_inputs(), torch.rand(64, 64, 32, 32))
    x = x.to(device)
    with parity.tf32(cls == "tf32"):
        torch.manual_seed(0)
        ours = runnable.ModelNew(*init).to(device)
        theirs = modelnew.ModelNew(*init, numerics=cls, device=device)
        theirs.load_state_dict(ours.state_dict())
        assert modelnew.explain(theirs, x).startswith("fused")
        dy = torch.randn_like(theirs(x))
        ours(x)  # so that both have seen one batch
        pairs = zip(results(ours, x, dy), results(theirs, x, dy), strict=True)
        for number, (actual, expected) in enumerate(pairs):
            if number == WEIGHT_GRADIENT:
                error = (actual - expected).abs().max() / expected.abs().max()
                assert error < (1e-6 if cls == "fp32" else 1e-4)
            else:
                assert torch.equal(actual, expected)


def test_gradients_in_evaluation_equal_the_packages(runnable, device):
    torch.manual_seed(0)
    ours, x = runnable.ModelNew(*SMALL).to(device), torch.rand(3, 16, 7, 6, device=device)
    theirs = modelnew.ModelNew(*SMALL, numerics="fp32", device=device)
    ours(x)
    theirs.load_state_dict(ours.state_dict())
    gradients = []
    for model in (ours.eval(), theirs.eval()):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        gradients.append(
            torch.autograd.grad(
                y, [leaf, *model.parameters()], torch.linspace(-1, 1, y.numel(), device=device).view_as(y)
            )
        )
    for actual, expected in zip(*gradients, strict=True):
        assert torch.equal(actual, expected)
    y = ours(x)
    ours.batch_norm.running_mean.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("init", "shape", "message"),
    [
        ([16, 16, 3, 2, 1, 1, 4], None, "stride 1, received 2"),
        ([6, 16, 3, 1, 1, 1, 4], (1, 6, 4, 4), "multiples of 16"),
        ([16, 16, 3, 1, 1, 1, 4], (0, 16, 4, 4), "the batch is empty"),
    ],
)
def test_refuses_what_its_kernels_do_not_take(runnable, device, init, shape, message):
    with pytest.raises(ValueError, match=message):
        runnable.ModelNew(*init).to(device)(torch.rand(shape, device=device))


def test_command(tmp_path):
    path = tmp_path / "file.py"

    def invoke(*arguments):
        return CliRunner().invoke(submission.command, ["--output", str(path), *arguments])

    assert invoke("--check").exit_code == 1
    assert not path.exists()
    assert invoke().exit_code == 0
    assert path.read_text(encoding="utf-8") == FILE.read_text(encoding="utf-8")
    assert "is current" in invoke("--check").output
    path.write_text(path.read_text(encoding="utf-8") + "\n")
    assert "run the command without --check" in invoke("--check").output
    path = tmp_path / "nowhere" / "file.py"
    assert "cannot write" in invoke().output


TOY = {
    "__init__": "",
    "a": """
        \"\"\"About a.\"\"\"
        import math
        LIMIT, _STEP = 3, 4
        # A comment on scale.
        @staticmethod
        def scale(v):
            return math.floor(v) * LIMIT + _STEP
        def unused():
            try:
                return 1
            except ValueError:
                raise
        """,
    "b": """
        \"\"\"About b.\"\"\"
        from . import a as first
        from .a import LIMIT as OTHER
        LIMIT = [n for n in range(5)]
        def scale(v):
            extra = first.scale(v)
            return extra + len(LIMIT) + OTHER
        def extra():
            \"\"\"As torch.nn.functional.tanh and torch.nn.Tanh.\"\"\"
            return 0.5
        """,
    "entry": """
        \"\"\"About all.\"\"\"
        from . import a, b
        class Result:
            def of(self, v):
                extra = b.extra()
                return a.scale(v) + b.scale(v) + extra
        """,
}


def test_names_imports_and_what_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    for name, text in TOY.items():
        (tmp_path / "toy" / f"{name}.py").write_text(textwrap.dedent(text).lstrip(), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(submission, "ENTRY", "toy.entry")
    monkeypatch.setattr(submission, "PACKAGES", ("toy",))
    text, found = submission.generate(), {}
    exec(text, found)
    assert found["Result"]().of(2.5) == importlib.import_module("toy.entry").Result().of(2.5) == 10 + 18 + 0.5
    assert text.startswith('"""About all.\n\nWritten by')
    assert "import math\n" in text
    assert "# A comment on scale.\n@staticmethod\ndef scale(v):" in text
    assert "def b_scale(v):\n    extra = scale(v)\n    return extra + len(b_LIMIT) + LIMIT" in text
    assert "extra = b_extra()" in text  # or it would call itself
    assert '"""As PyTorch\'s tanh and PyTorch\'s Tanh."""' in text
    assert "unused" not in text
    assert text.index("# About a.") < text.index("# About b.") < text.index("class Result")


@pytest.mark.parametrize("word", ["try", "nn.functional"])
def test_a_word_that_the_form_forbids_is_named(monkeypatch, word):
    monkeypatch.setattr(submission, "_dict", lambda files: f"{{'a': '{word}'}}")
    with pytest.raises(ValueError, match=f"has no '{word}'"):
        submission.generate()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_runs_without_the_package(tmp_path):
    command = [sys.executable, "-c", HARNESS, str(FILE)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(42)
    x = torch.rand(512, 64, 32, 32).cuda()
    with torch.no_grad(), parity.tf32(True):
        torch.manual_seed(42)
        model = modelnew.ModelNew(*modelnew.get_init_inputs())
        assert model(x).double().sum().item() == float(done.stdout)


def test_evaluation(tmp_path, device):
    """The command that runs KernelBench's code, on a stand-in for it: the record, and the gradients."""
    assert "is no clone of KernelBench" in CliRunner().invoke(kernelbench_eval.command, [str(tmp_path)]).output
    code = tmp_path / "src" / "kernelbench"
    for folder in (code, (tmp_path / kernelbench_eval.PROBLEM).parent):
        folder.mkdir(parents=True)
    (tmp_path / kernelbench_eval.PROBLEM).write_text(PROBLEM)
    for name, text in KERNELBENCH.items():
        (code / f"{name}.py").write_text(text)
    command = [sys.executable, "-m", "tools.kernelbench_eval", tmp_path, "--processes", "2", "--output", tmp_path]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **hidden})
    if device == "cpu":
        assert "KernelBench's evaluation needs a GPU" in done.stderr
        return
    assert not done.returncode, done.stderr
    (path,) = tmp_path.glob("kernelbench_*.json")
    record = json.loads(path.read_text())
    assert record["rows"] == [{"correct": True, "ms": 0.4, "reference_ms": 2.0, "speedup": 5.0}] * 2
    assert record["static_errors"] == ["an error"]
    assert "conv_transpose.weight" in record["gradient_errors"]
    assert all(ours <= 1.1 * theirs for ours, theirs in record["gradient_errors"].values())
