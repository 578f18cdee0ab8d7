import json

from click.testing import CliRunner

from modelnew.__main__ import main
from modelnew.scaling import _WAYS


def test_a_tiny_run_of_two_processes(tmp_path):
    arguments = ["scaling", "--tiny", "--device", "cpu", "--images", "1", "--trials", "1", "--output", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "scaling_cpu.json").read_text())
    assert {"command", "versions", "digest", "rows"} <= record.keys()
    rows = {(row["who"], row["what"]): row for row in record["rows"]}
    assert {what for who, what in rows if who == "modelnew"} == {"alone", "apart", *_WAYS}
    for row in rows.values():
        assert row["gpus"] == (1 if row["what"] == "alone" else 2)
        alone = rows[row["who"], "alone"]["ms"]
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert abs(row["added_ms"] - (row["ms"] - alone)) < 1e-3
        assert abs(row["scaling"] - alone / row["ms"]) < 1e-3
    assert "weak scaling" in result.output


def test_what_it_refuses():
    without_tiny = "scaling without --tiny needs a GPU: "
    for arguments, message in ((["--device", "cpu"], without_tiny), (["--gpus", "1"], "--gpus")):
        result = CliRunner().invoke(main, ["scaling", *arguments])
        assert result.exit_code
        assert message in result.output
