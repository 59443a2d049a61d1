"""A notebook trains and shows the report."""

import re

import pytest

CELLS = [
    """
from torch import nn
import cifar_lightning
model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
""",
    """
small = {"data.limit": 1000, "data.image_size": 16, "data.num_workers": 0, "trainer.accelerator": "cpu"}
run = cifar_lightning.fit(model, "synthetic", epochs=3, batch_size=20, run_dir="run",
                          **{"model.memory_format": "contiguous", **small})
""",
    "run",
    "run.report()",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter
def test_a_notebook_shows_bar_and_report_inline_and_no_warnings(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    imported, trained, shown, report = (cell.outputs for cell in notebook.cells)
    assert [output.get("text") for output in imported] == []
    assert [output.text for output in trained if output.get("name") == "stderr"] == []
    assert len([output for output in trained if output.output_type == "display_data"]) == 1
    text = "".join(output.get("text", "") for output in trained)
    assert all(f"epoch {k}/3  train loss" in text for k in (1, 2, 3))
    assert not re.search(r"\r|\x1b\[[^m]*[A-Za-ln-z]", text), "colours, but nothing that moves the cursor"
    assert shown[0].data["text/plain"].startswith("Run('run': test accuracy")
    assert report[0].data["text/html"].startswith("<iframe srcdoc=")
