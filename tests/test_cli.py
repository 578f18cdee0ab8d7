import json
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import invoked
import pytest
import torch
from faults import planted
from rich.console import Console

from cupy_kernels import backend, emulator, source
from cupy_kernels.errors import BackendError
from modelnew import __main__ as cli
from modelnew import __version__, commands, environment, timing


@pytest.fixture
def small(monkeypatch):
    """Shrinks the main job's model and images; everything else is as users run it."""

    def inputs(batch, *, seed, device):
        return [torch.rand(batch, 4, 6, 6, generator=torch.Generator().manual_seed(seed)).to(device)]

    monkeypatch.setattr(cli, "get_init_inputs", lambda: [4, 8, 3, 1, 1, 1, 2])
    monkeypatch.setattr(cli, "get_inputs", inputs)


invoke = partial(invoked.invoke, cli.main)


def test_module_runs_and_help_explains_every_option():
    done = subprocess.run([sys.executable, "-m", "modelnew", "--help"], capture_output=True, text=True, check=True)
    text = re.sub(r"\s+", " ", done.stdout)
    for parameter in cli.parity_command.params:
        assert max(parameter.opts, key=len) in text
        assert parameter.help.split("  ")[0] in text
    for name in ("parity", "bench", "fuzz", "host", "scaling", "training", "env"):
        assert f" {name} " in text


def test_version():
    assert invoke("--version") == (0, f"modelnew, version {__version__} ")


def test_env():
    code, text = invoke("env")
    assert code == 0
    assert f"kernels {source.digest()[:12]} (" in text
    assert environment.backend()["why"] in text
    assert all(f"{key} " in text and f"({meaning})" in text for key, meaning in cli._MEANINGS.items())
    assert re.search(r"versions.nvrtc_wgmma [\w.]+ \(the one for kernels with wgmma instructions", text)
    code, text = invoke("env", "--json")
    assert code == 0
    assert json.loads(text)["digest"] == source.digest()
    assert json.loads(text)["versions"]["torch"] == torch.__version__


def test_env_says_which_records_belong_to_the_code(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "results", lambda: tmp_path)
    (tmp_path / "bench_a.json").write_text(json.dumps({"digest": source.digest()}))
    for other in "bc":
        (tmp_path / f"bench_{other}.json").write_text(json.dumps({"digest": "0"}))
    _, text = invoke("env")
    assert "Records in benchmarks/results, of these kernels: bench_a.json" in text
    assert "Records in benchmarks/results, of other kernels: bench_b.json, bench_c.json" in text


@pytest.mark.parametrize(("columns", "widest"), [("60", 60), ("400", 100)])
def test_env_fits_the_terminal(monkeypatch, columns, widest):
    """All but the command to install, which is to be copied, and words that are longer."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(environment, "backend", lambda: {"name": "emulator", "why": 40 * "why "})
    _, text = invoke("env", spaces="x{9}")
    lines = [line for line in text.splitlines() if not line.startswith("Best")]
    assert widest - 10 < max(map(len, lines)) <= widest


def test_main_job(device, small):
    code, text = invoke("--batch", "2", "--device", device, "--trials", "2")
    assert code == 0, text
    assert "torch.testing.assert_close(y_new, y) holds" in text
    for exact in ("torch.allclose(y, y_new)", "torch.equal(y, y_new)"):
        assert (f"{exact} holds" in text) == (device == "cuda")
    assert ("Not judged on a CPU: torch.allclose(y, y_new)" in text) == (device == "cpu")
    assert "Replaced conv_transpose, batch_norm, tanh, max_pool, group_norm." in text
    for what in ("output", "grad x", "grad conv_transpose.bias", "batch_norm.running_var"):
        assert what in text
    assert "Parity holds." in text
    assert "FAIL" not in text
    assert ("emulator" in text) == (device == "cpu")
    assert ("forward + backward" in text) == (device == "cuda")


@pytest.mark.parametrize("command", [(), ("parity",)])
def test_options(small, command):
    code, text = invoke(
        *command, "--device", "cpu", "--replace", "tanh, group_norm", "--numerics", "fp32", "--seed", "3"
    )
    assert code == 0
    assert "Replaced tanh, group_norm." in text


def test_each_class_is_judged_as_itself(monkeypatch):
    """On a CPU, too, where PyTorch has no TF32: ours is not held to float32's errors, and bfloat16's are found."""
    monkeypatch.setattr(cli, "get_init_inputs", lambda: [16, 16, 3, 1, 1, 1, 4])
    x = torch.randn(2, 16, 6, 8)
    monkeypatch.setattr(cli, "get_inputs", lambda *_, **__: [x])
    for numerics, cls in (("tf32", "tf32"), ("fp32", "fp32"), ("auto", "fp32")):
        code, text = invoke("--device", "cpu", "--numerics", numerics)
        assert code == 0, text
        assert re.search(f"a float64 run, class {cls}: [^:]+ Replaced", text)
        assert ("PyTorch has no TF32" in text) == (cls == "tf32")
    compare = cli.compare_models
    rounded = lambda model, ours, x, *more: compare(model, ours, x, "fp32", *more[1:])  # noqa: E731
    monkeypatch.setattr(cli, "compare_models", rounded)
    assert invoke("--device", "cpu", "--numerics", "tf32")[0] == 1
    assert invoke("--device", "cpu", "--numerics", "fp32")[0] == 0


@pytest.mark.parametrize("width", [60, 80])
def test_the_table_of_errors_is_readable(small, monkeypatch, width):
    """Every row is one line, and no cell is cut."""
    monkeypatch.setattr(cli, "out", Console(width=width))
    code, text = invoke("--device", "cpu", spaces="(?!)")  # which are kept
    assert code == 0, text
    rows = re.findall(r"^ *((?:grad )?[\w.]+) +((?:[\d.e+-]+ +)+)ok\*? *$", text, re.MULTILINE)
    assert [name for name, _ in rows[-2:]] == ["batch_norm.running_mean", "batch_norm.running_var"]
    assert "grad conv_transpose.weight" in dict(rows)
    assert {len(numbers.split()) for _, numbers in rows} == {3 if width == 60 else 5}
    assert ("A terminal of 80 columns shows the maxima." in " ".join(text.split())) == (width == 60)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_progress_says_what_is_done(monkeypatch, capsys):
    """While kernels are compiled, in whatever order that ends, one of them; else what was set last.

    Where there is no terminal, each text is one line as it begins, and what was set again once nothing is compiled.
    """
    monkeypatch.setattr(backend, "_listeners", [])
    shown = []
    with commands.doing(shown.append) as what:
        (listener,) = backend._listeners
        listener(SimpleNamespace(name="0"))()
        what("running")
        first, second = listener(SimpleNamespace(name="a")), listener(SimpleNamespace(name="b"))
        what("timing")
        first()
        second()
        listener(SimpleNamespace(name="a"))()
        listener(SimpleNamespace(name="c"))()
    a, b = "compiling or loading a", "compiling or loading b"
    c = "compiling or loading c"
    assert shown == ["compiling or loading 0", "", "running", a, b, b, b, "timing", a, "timing", c, "timing"]
    assert not backend._listeners
    said = capsys.readouterr()
    assert said.err.splitlines() == ["compiling or loading 0", "running", a, b, "timing", c, "timing"]
    assert not said.out


def test_progress_without_a_terminal(monkeypatch, capsys):
    """A line as each step begins, and for each tenth; on a terminal, a bar alone."""
    with commands.progress(40) as update:
        update(description="one")
        assert capsys.readouterr().err == "one\n"
        for _ in range(40):
            update(advance=1, description="two")
    assert capsys.readouterr().err.splitlines() == ["two", *(f"{n} of 40" for n in range(4, 41, 4))]
    monkeypatch.setenv("FORCE_COLOR", "1")
    with commands.progress(40) as update:
        update(advance=40, description="one")
    shown = capsys.readouterr().err
    assert "40/40" in shown
    assert "40 of 40" not in shown


def test_broken_kernel_fails(small):
    with planted("tanh.cuh", ("(acc_t)1 - y * y", "(acc_t)1.001f - y * y")):
        code, text = invoke("--device", "cpu", "--replace", "tanh")
    assert code == 1
    assert "Parity does not hold" in text
    assert "FAIL" in text


def test_broken_output_fails_the_literal_assertion(small, monkeypatch):
    monkeypatch.setattr(cli, "is_close", lambda *_: False)
    monkeypatch.setattr(cli, "compare_models", lambda *_: [])
    assert invoke("--device", "cpu")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replace", "tanh,foo"], "'foo': not among conv_transpose"),
        (["--replace", ""], "'': not among conv_transpose"),
        (["--seed", "-1"], "-1 is not in the range"),
        (["--seed", str(2**64)], "is not in the range"),
        (["--device", "xpu"], "received xpu"),
        (["--device", "nowhere"], "nowhere"),
        (["--numerics", "fp8"], "fp8"),
        (["--batch", "0"], "0 is not in the range"),
        (["parity", "--batch", "0"], "0 is not in the range"),
        (["--batch", "2", "env"], "unexpected extra argument (env)"),
        (["readme"], "No such command 'readme'. Commands: bench, env, fuzz, host, parity, scaling, training."),
        (["explain"], "No such command 'explain'. It is for Python: see help(modelnew.explain)."),
    ],
)
def test_bad_options(arguments, message):
    code, text = invoke(*arguments)
    assert code == 2
    assert message in text


def test_nothing_to_run_on(monkeypatch):
    def none():
        raise BackendError("no compiler here")

    monkeypatch.setattr(emulator, "compiler", none)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, text = invoke()
    assert code == 1
    assert "Error: no compiler here" in text
    code, text = invoke("--device", "cuda")
    assert code == 1
    assert "no kernel can run on cuda" in text


@pytest.mark.parametrize("command", ["bench", "fuzz", "host", "scaling", "training"])
def test_a_folder_that_cannot_be_written_is_refused_first(command, tmp_path):
    file = tmp_path / "file"
    file.touch()
    code, text = invoke(command, "--output", file / "deep")
    assert code == 2
    assert "no file can be written there: [Errno" in text
    arguments = ["--output", str(tmp_path / "new")]
    cli.main.commands[command].make_context(command, arguments, resilient_parsing=True)  # as shells complete words
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", [["parity"], ["bench"], ["fuzz"], ["scaling", "--tiny"], ["training"]])
def test_a_cache_that_cannot_be_used_is_refused_first(command, monkeypatch):
    monkeypatch.setenv("CUPY_KERNELS_CACHE_DIR", "relative")
    code, text = invoke(*command, "--device", "cpu")
    assert code == 1
    assert text.startswith("Error: cannot keep compiled kernels in 'relative', set by CUPY_KERNELS_CACHE_DIR")


def test_kernel_that_does_not_compile(small):
    with source.override({"common.cuh": "#error planted\n"}):
        code, text = invoke("--device", "cpu")
    assert code == 1
    assert "does not compile" in text
    assert "planted" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_measured_times():
    x = torch.randn(1 << 26, device="cuda")
    times = timing.measure(lambda: x.add_(1), x.device, trials=5)
    assert 0.05 < times.min <= times.median <= times.max < 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_host(tmp_path):
    """Each layer is timed in four ways, and the first launch comes before PyTorch's forward ends.

    In a process of its own: here, what observes launches and poisons outputs takes most of the time.
    """
    command = [sys.executable, "-m", "modelnew", "host", "--trials", "1", "--output", tmp_path]
    subprocess.run(command, capture_output=True, check=True)
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    *timed, first = rows
    assert len({(r["operator"], r["what"], r["addresses"]) for r in timed}) == len(timed) == 7 * 2 * 2
    assert all(0 < r["us_min"] <= r["us"] for r in rows)
    model = next(r for r in timed if r["operator"] == first["operator"] and r["what"] == "forward")
    assert first["us"] < model["eager_us"]
