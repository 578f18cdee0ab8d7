"""`make docs` builds the guide and the API reference of all modules, without a warning."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_docs(tmp_path):
    pytest.importorskip("pdoc")
    command = ["make", "docs", f"PYTHON={sys.executable}", f"DOCS={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr
    modules = [p for name in ("modelnew", "cupy_kernels") for p in (ROOT / name).glob("[a-z]*.py")]
    pages = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.html")}
    missing = {str(p.relative_to(ROOT).with_suffix(".html")) for p in modules} - pages
    assert not missing
    assert {"modelnew.html", "cupy_kernels.html", "modelnew/functional.html", "cupy_kernels/emulator.html"} <= pages
    guide = (tmp_path / "guide.html").read_text(encoding="utf-8")
    titles = [page.read_text(encoding="utf-8").split("\n")[0][2:] for page in (ROOT / "docs").rglob("*.md")]
    assert {"modelnew", "Contributing", *titles} <= set(re.findall("<h1 id=[^>]*>(.*)</h1>", guide))
    assert {*re.findall('href="#([^"]+)"', guide)} <= {*re.findall(' id="([^"]+)"', guide)}
    assert "data:image/svg+xml;base64" in guide
    page = (tmp_path / "modelnew" / "functional.html").read_text(encoding="utf-8")
    assert "num_groups: a divisor of C;" in page
    assert "input: [N, C, *], any number of dimensions from 2 on; float32" in page
