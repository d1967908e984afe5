"""What a run draws when it ends, and what it says when it cannot."""

from jexit.loops import pictures
from jexit.loops.pictures import draw
from report_files import write_trained


def test_one_drawing_that_fails_stops_neither_the_other_nor_the_run(tmp_path, monkeypatch, capsys):
    workdir = write_trained(tmp_path, steps=3)
    (workdir / "plots").write_text("a file where the folder belongs")
    assert draw(workdir) == str(workdir / "report.html")
    error = capsys.readouterr().err
    assert error.startswith("jexit: the plots were not drawn (cannot write ")
    assert f"python -m jexit.report {workdir}" in error and error.count("\n") == 1

    def fail(*_):
        raise KeyError("x")

    monkeypatch.setattr(pictures, "write_report", fail)
    assert draw(workdir) == "no picture"
    error = capsys.readouterr().err  # a fault, with its place
    assert "Traceback" in error and "in fail" in error
    assert error.splitlines()[-1].startswith("jexit: the report was not drawn (")
