"""Runs examples/qoft_to_served.ipynb against a Hub on the loopback.

``python tests/helpers/run_notebook.py`` runs the notebook in a temporary folder and stores what the cells print in the notebook.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from hub_server import Hub, serving
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).parents[2] / "examples" / "qoft_to_served.ipynb"
TOKEN = "hf_" + "No7" * 12
#: a cell that takes longer than so many seconds hangs
PATIENCE = 900


def new_hub() -> Hub:
    """A Hub on which the notebook's repository may be made."""
    return Hub({TOKEN: "owner"})


def execute(folder: Path, hub: Hub) -> NotebookNode:
    """The notebook with what its cells print in ``folder``; the first cell that fails raises an error."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    client = NotebookClient(
        notebook,
        timeout=PATIENCE,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute(env=environment)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, serving(new_hub()) as hub:
        notebook = execute(Path(folder), hub)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
