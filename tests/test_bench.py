"""`python3 -m modelnew bench`: what it measures, what it refuses, and the rows that it writes."""

import json
import re
import subprocess
import sys
from functools import partial

import invoked
import pytest
import torch
from faults import planted
from test_records import row

from cupy_kernels import source
from modelnew import bench, entrants, environment, functional, numerics, timing, workloads
from modelnew.workloads import Shape

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def compiled(monkeypatch):
    """torch.compile that compiles nothing, but takes the arguments; a list of the modes it was asked for."""
    modes = []

    def fake(model, *, mode, fullgraph, dynamic):
        assert fullgraph
        assert dynamic is False
        modes.append(mode)
        return model

    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(torch.compiler, "reset", lambda: modes.append("reset"))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    return modes


invoke = partial(invoked.invoke, bench.bench_command)


def measured(tmp_path, *arguments, device="cpu", code=0):
    """Rows by (what, class, n, who, layout)."""
    options = "--device", device, "--size", "6", "--no-startup", "--output", str(tmp_path)
    found, text = invoke(*options, *arguments)
    assert found == code, text
    (path,) = tmp_path.glob("bench_*.json")
    rows = json.loads(path.read_text())["rows"]
    return {(row["what"], row["class"], row["n"], row["who"], row["layout"]): row for row in rows}


def test_command(device, small, compiled, tmp_path):
    code, text = invoke(
        *(
            "--device",
            device,
            "--batches",
            "3,1",
            "--size",
            "6",
            "--trials",
            "2",
            "--peers",
            "all",
            "--classes",
            "fp32",
        ),
        *("--no-startup", "--output", str(tmp_path)),
    )
    assert code == 0, text
    name = "bench_cpu" if device == "cpu" else f"bench_{environment.slug()}"
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.json", f"{name}.png"}
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["command"].startswith("python3 -m modelnew")
    assert content["digest"] == source.digest()
    assert content["versions"]["torch"] == torch.__version__
    assert Shape(**content["shape"]) == Shape(4, 8, 3, 1, 1, 6)

    everyone = {("eager", "nchw"), ("eager", "nhwc"), ("modelnew", "nchw")}
    for n in (3, 1):
        for what in workloads.WORKLOADS:
            rows = [r for r in content["rows"] if (r["what"], r["n"]) == (what, n)]
            if what in workloads.FLOAT16 or (n == 1 and what not in workloads.MODELS | workloads.COMPILED):
                assert not rows
                continue
            whos, modes = set(everyone), ["compile", "compile-max-autotune", "compile-reduce-overhead"]
            if what in workloads.MODELS:
                whos |= {(mode, layout) for mode in modes for layout in ("nchw", "nhwc")}
                if device == "cuda":
                    whos |= {("modelnew-graph", "nchw"), ("eager-graph", "nchw"), ("eager-graph", "nhwc")}
            if what in workloads.COMPILED:
                whos = {("modelnew", "nchw")} | {(f"modelnew-{mode}", "nchw") for mode in (modes[0], modes[2])}
            if what in workloads.KERNELS:  # a model of 4 channels does not run them
                assert [(r["who"], r["failed"]) for r in rows] == [("modelnew", False)]
                assert "not multiples of 16" in rows[0]["reason"]
                assert f"{what}: {workloads.KERNELS[what]}." in text
                continue
            assert {(r["who"], r["layout"]) for r in rows} == whos
            assert len(rows) == len(whos)
            for r in rows:
                keys = ["what", "class", "n", "who", "layout", "ms", "ms_min", "ms_max", "peak_mb"]
                several = device == "cuda" and "calls" in r  # a GPU may be so busy that a trial is one call
                assert list(r) == keys + ["calls"] * several, r.get("reason")
                assert 0 < r["ms_min"] <= r["ms"] <= r["ms_max"]
                assert (r["peak_mb"] is None) == (device == "cpu")
            assert re.search(rf"{what} fp32 {n} ", text)
    assert {"default", "max-autotune", "reduce-overhead", "reset"} == set(compiled)
    assert ("say nothing about speed" in text) == (device == "cpu")


def test_without_wgmma(small, tmp_path, monkeypatch):
    """Only the record's name, and which kernels may run, differ."""
    seen = []
    compare = bench.check
    monkeypatch.setattr(bench, "check", lambda *given: seen.append([*numerics._wgmma_chosen]) or compare(*given))
    options = "--device", "cpu", "--size", "6", "--batches", "1", "--what", "conv_forward", "--trials", "1"
    code, text = invoke(*options, "--no-wgmma", "--output", str(tmp_path))
    assert code == 0, text
    assert seen == [[False]]
    assert not numerics._wgmma_chosen
    assert [path.name for path in tmp_path.glob("*.json")] == [f"bench_cpu_nvrtc{environment.versions()['nvrtc']}.json"]


def test_16_bit_class(device, small, tmp_path):
    what = ["forward_train", "conv_forward", "post_conv_forward"]
    what += ["step"] if device == "cpu" else []  # cuDNN takes a minute to choose its bf16 backward
    options = "--classes", "bf16", "--batches", "2", "--trials", "1", "--peers", "eager"
    rows = measured(tmp_path, *options, "--what", ",".join(what), device=device)
    assert all(r["ms"] for r in rows.values()), rows


def test_all_in_float16(device, fusible, compiled, launched, tmp_path):
    """Measured in the class fp16 alone, without autocast; ours runs on channels_last tensors as they are."""
    options = "--what", ",".join(workloads.FLOAT16), "--batches", "3", "--size", "6", "--trials", "1"
    rows = measured(tmp_path, *options, "--classes", "fp32,fp16", "--peers", "compile", device=device)
    assert {key[:3] for key in rows} == {(what, "fp16", 3) for what in workloads.FLOAT16}
    for what in workloads.FLOAT16:
        whos = {("modelnew", "nhwc"), *((who, layout) for who in ("eager", "compile") for layout in ("nchw", "nhwc"))}
        assert {key[3:] for key in rows if key[0] == what} == whos
    assert all(r["ms"] for r in rows.values()), rows
    pools = [dict(kernel.defines) for kernel in launched if kernel.name == "conv_bn_pool"]
    assert {(m["scalar_t"], m["CHANNELS_LAST"]) for m in pools} == {("half_t", 1)}


def test_wrong_float16_results_are_not_timed(fusible, tmp_path):
    with planted("pooled_tail.cu", ("bn_affine((v[i] - m) * s, w, b)", "bn_affine((v[i] - m) * s, w, b) * 1.01f")):
        rows = measured(
            tmp_path, "--what", "float16_step", "--classes", "fp16", "--batches", "2", "--size", "6", code=1
        )
    assert "parity fails" in rows["float16_step", "fp16", 2, "modelnew", "nhwc"]["reason"]


def test_nothing_is_written_for_a_cpu(small, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "results", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    code, text = invoke("--device", "cpu", "--what", "forward_eval")
    assert code == 0
    assert "recorded" not in text
    assert not list(tmp_path.iterdir())


def test_wrong_results_are_not_timed(small, tmp_path):
    fault = planted("tanh.cuh", ("(acc_t)1 - y * y", "(acc_t)1.001f - y * y"))
    with fault:
        rows = measured(tmp_path, "--what", "forward_train_grad,step", "--batches", "2", code=1)
    assert rows["forward_train_grad", "fp32", 2, "modelnew", "nchw"]["ms"] > 0
    failed = rows["step", "fp32", 2, "modelnew", "nchw"]
    assert (failed["ms"], failed["ms_min"], failed["ms_max"], failed["failed"]) == (None, None, None, True)
    assert "parity fails: grad" in failed["reason"]
    assert rows["step", "fp32", 2, "eager", "nchw"]["ms"] > 0


def test_kernels_alone_of_a_wrong_call_are_not_timed(fusible, tmp_path):
    with planted("pooled_tail_backward.cu", ("sum += d[i];", "sum += d[i] * 1.001f;")):
        rows = measured(tmp_path, "--what", "wgrad_kernel", "--batches", "2", code=1)
    assert "parity fails: grad" in rows["wgrad_kernel", "fp32", 2, "modelnew", "nchw"]["reason"]


def test_kernels_alone_are_timed(device, fusible, tmp_path):
    what = ",".join(workloads.KERNELS)
    rows = measured(tmp_path, "--what", what, "--classes", "fp32,fp16", "--batches", "2", device=device)
    rows = {key[:3]: row for key, row in rows.items()}
    assert list(rows) == [(what, "fp32", 2) for what in workloads.KERNELS]
    assert all(r["ms"] > 0 for r in rows.values())


def test_what_fails_is_a_row_with_a_reason(small, compiled, monkeypatch, tmp_path):
    def refuse(model, **options):
        raise NotImplementedError("no Triton here\nand more")

    def build(case, what, cls, who, layout):
        if layout == "nhwc" and who == "eager":
            raise torch.OutOfMemoryError("too much")
        return entrants.build(case, what, cls, who, layout)

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(bench, "build", build)
    rows = measured(tmp_path, "--what", "forward_eval", "--peers", "compile")
    rows = {key[3:]: r for key, r in rows.items()}
    assert rows["compile", "nchw"]["reason"] == "NotImplementedError: no Triton here"
    assert rows["eager", "nhwc"]["reason"] == "out of memory"
    for r in rows.values():
        assert (r["ms"] is None) == ("reason" in r)
        assert not r.get("failed")
    assert rows["modelnew", "nchw"]["ms"] > 0


def test_our_exceptions_are_failures(small, monkeypatch, tmp_path):
    def broken(*args, **options):
        raise RuntimeError("planted")

    files = [sys.modules[f"modelnew.functional.{name}"] for name in ("conv_transpose", "conv_bn_pool")]
    for where in (functional, *files):  # where the layer and the fused chain find it, too
        monkeypatch.setattr(where, "conv_transpose2d", broken)
    rows = measured(tmp_path, "--what", "conv_forward,forward_eval", code=1)
    ours = [r for r in rows.values() if r["who"] == "modelnew"]
    assert [(r["reason"], r["failed"]) for r in ours] == [("RuntimeError: planted", True)] * 2
    _, text = invoke("--device", "cpu", "--size", "6", "--what", "conv_forward")
    assert "FAIL" in text
    assert "because of RuntimeError: planted: conv_forward fp32 N=1 modelnew nchw" in text


def test_budget(small, tmp_path):
    code, text = invoke("--device", "cpu", "--budget", "0", "--output", str(tmp_path))
    assert code == 0
    assert "nothing to draw" in text
    rows = json.loads((tmp_path / "bench_cpu.json").read_text())["rows"]
    assert {r["reason"] for r in rows} == {"time budget of 0 s spent"}
    # Those are of the class fp16 alone, or of torch.compile.
    assert {r["what"] for r in rows} == set(workloads.WORKLOADS) - set(workloads.FLOAT16 | workloads.COMPILED)


def test_few_images_are_timed_by_the_host(small, monkeypatch):
    """In rows of calls; more images by events, which a CPU has not."""
    clocks = []

    class Clock(timing.Clock):
        def __init__(self, device, trial_ms=None, latency=False):
            clocks.append((trial_ms, latency))
            super().__init__(device, trial_ms, latency)

    monkeypatch.setattr(bench, "Clock", Clock)
    what = "forward_eval", "latency_forward_train"
    plan = bench._plan(CPU, False, (2, 9), what, None, "none", 1, 6, 0, 60, False)._replace(trial_ms_of_few=1e3)
    monkeypatch.setattr(timing, "_ESTIMATE", 1)
    for rows in bench.run(plan, CPU, lambda text: None):
        assert all(row["ms"] > 0 and (row["n"] == 9 or row["calls"] > 1) for row in rows)
    assert clocks == [(1e3, False), (1e3, True), (None, False)]


def test_torch_compile_stops_before_the_budget(small, compiled, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "_COMPILE_SHARE", 0)
    rows = measured(tmp_path, "--what", "forward_eval", "--peers", "compile", "--budget", "600")
    for (*_, who, _), r in rows.items():
        assert ("reason" in r) == who.startswith("compile")
    assert compiled == ["reset"]


def test_first_calls(small, monkeypatch):
    monkeypatch.setattr(bench, "_STARTUPS", 1)
    plan = bench._plan(CPU, False, (2,), None, None, "eager", None, 6, 0, 60, True)
    rows = bench.first_calls(plan, CPU)
    assert [(r["what"], r["who"]) for r in rows] == [
        ("startup_cold", "modelnew"),
        ("startup_warm", "modelnew"),
        ("startup_warm", "eager"),
    ]
    cold, warm, eager = (r["ms"] for r in rows)
    assert cold > warm > 0
    assert eager > 0
    assert all(r["n"] == 2 and 0 <= r["context_ms"] < r["ms"] for r in rows)


def test_first_calls_that_fail(monkeypatch):
    monkeypatch.setattr(bench, "_FIRST_CALL", "raise SystemExit('planted')")
    plan = bench._plan(CPU, False, None, None, None, "none", None, None, 0, 60, True)
    rows = bench.first_calls(plan, CPU)
    assert [(r["what"], r["ms"], r["reason"], r["failed"]) for r in rows] == [
        ("startup_cold", None, "planted", True),
        ("startup_warm", None, "planted", True),
    ]


def test_startup_comes_first(small, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "first_calls", lambda plan, device: [row(what="startup_cold", n=2, **{"class": "fp32"})])
    rows = measured(tmp_path, "--startup", "--what", "forward_eval", "--peers", "none")
    assert [what for what, *_ in rows] == ["startup_cold", "forward_eval"]


def test_plans():
    gpu = torch.device("cuda")
    nothing = (None,) * 6
    plan = bench._plan(gpu, False, *nothing, 0, 240, None)
    assert plan[:6] == ((512, 1, 4096, 64, 8), ("tf32", "fp32"), tuple(workloads.WORKLOADS), "compile", 20, 10)
    assert plan.startup
    assert (64, "latency_forward_train", "tf32") not in plan.cells(gpu)
    assert (8, "latency_forward_train", "tf32") in plan.cells(gpu)
    assert {n for n, what, _ in plan.cells(gpu) if what == "wgrad"} == {512}
    quick = bench._plan(gpu, True, *nothing, 0, 240, None)
    assert quick.batches == (512, 1)
    assert not quick.startup
    assert set(quick.what) == {
        w
        for w in workloads.WORKLOADS
        if not any(word in w for word in ("latency", "post", "general", "leaky", "compiled"))
    }
    own = bench._plan(gpu, True, (4,), ("step",), *nothing[2:], 0, 240, True)
    assert own[:3] == ((4,), ("tf32", "fp32"), ("step",))
    assert own.startup


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "1,x"], "whole numbers"),
        (["--batches", "0"], "whole numbers"),
        (["--what", "forward"], "'forward': not among forward_train"),
        (["--what", "step,"], "'': not among forward_train"),
        (["--what", "step,float16_step", "--device", "cpu"], "float16_step: not measured with these"),
        (["--what", "compiled_step", "--peers", "eager", "--device", "cpu"], "compiled_... the peers compile or all"),
        (["--what", "wgrad_kernel", "--classes", "fp16", "--device", "cpu"], "wgrad_kernel: not measured with these"),
        (["--classes", "tf32", "--device", "cpu"], "a CPU has no tf32"),
        (["--classes", "fp8"], "'fp8': not among tf32"),
        (["--peers", "jax"], "jax"),
        (["--device", "xpu"], "received xpu"),
        (["--device", "nowhere"], "nowhere"),
        (["--plot-only", "nowhere.json"], "does not exist"),
    ],
)
def test_bad_options(arguments, message):
    code, text = invoke(*arguments)
    assert code == 2
    assert message in text


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, text = invoke("--device", "cuda")
    assert code == 1
    assert "no kernel can run on cuda" in text


def test_help_explains_every_option():
    command = [sys.executable, "-m", "modelnew", "bench", "--help"]
    text = re.sub(r"\s+", "", subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for parameter in bench.bench_command.params:
        assert max(parameter.opts, key=len) in text
        assert re.sub(r"\s+", "", parameter.help) in text
