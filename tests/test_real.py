"""The weeks' own code on real data: the scripts run where the packs are, and say so where not."""

import re
from importlib import import_module
from pathlib import Path

import pytest

REAL = Path(__file__).parent / "real"


@pytest.fixture(params=sorted(path.stem for path in REAL.glob("[a-z]*.py")))
def script(request, monkeypatch):
    """A script by name, as the folder's scripts import one another."""
    monkeypatch.syspath_prepend(str(REAL))
    return import_module(request.param)


@pytest.mark.slow
def test_a_script_runs_on_the_real_pack_at_a_tiny_size(script, shared_data, capsys):
    assert script.main(["--quick", "--data", str(shared_data)]) == 0
    assert re.search(r"\b[01]\.\d\d", capsys.readouterr().out), "it prints no score"


def test_a_pack_that_is_not_there_is_said_in_one_sentence(script, tmp_path, capsys):
    assert script.main(["--quick", "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
