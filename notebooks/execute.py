"""Run the notebooks from top to bottom and write their outputs into them.

    python notebooks/execute.py [quickstart ...]

The model is SmolLM2-135M-Instruct of the demo, or PPO_PLUS_NOTEBOOK_MODEL. Progress and warnings (stderr) are left out.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent


def execute(notebook: Path, model: str, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in a folder with this model; returns it with the outputs of this run.

    Raises:
        CellExecutionError: a cell raises.
    """
    node = nbformat.read(notebook, as_version=4)
    environment = {**os.environ, "PPO_PLUS_NOTEBOOK_MODEL": model}
    NotebookClient(node, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute(env=environment)
    for cell in node.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    node.metadata.language_info = {"name": "python"}
    return node


def main() -> None:
    sys.path.insert(0, str(NOTEBOOKS.parent / "recipes" / "demo"))
    from demo_assets import load_smollm2

    model = os.environ.get("PPO_PLUS_NOTEBOOK_MODEL") or str(load_smollm2())
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not sys.argv[1:] or notebook.stem in sys.argv[1:]:
            with tempfile.TemporaryDirectory() as folder:
                nbformat.write(execute(notebook, model, Path(folder)), notebook)
            print(f"{notebook.name}: {notebook.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
