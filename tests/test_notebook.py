"""examples/qoft_to_served.ipynb: what it shows is what happens, from a real model's training to the pushed model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from hub_server import Hub, serving
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode
from run_notebook import NOTEBOOK, execute, new_hub

from oftsurgery.cli.main import command_parser

REPO = "owner/smollm2-telegram"


@pytest.fixture(scope="module")
def stored() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: NotebookNode) -> str:
    texts = [out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs]
    return "".join(texts)


# --- the notebook as it is stored -------------------------------------------------------------------------------------


def test_the_notebook_is_valid_and_its_cells_compile(stored: NotebookNode) -> None:
    nbformat.validate(stored)
    for cell in code_cells(stored):
        compile(TransformerManager().transform_cell(cell.source), cell.id, "exec")


def commands(notebook: NotebookNode) -> list[list[str]]:
    shells = [cell.source for cell in code_cells(notebook) if cell.source.startswith("%%bash")]
    lines = [line.partition("|")[0] for shell in shells for line in shell.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("oftsurgery ")]


def test_its_commands_are_commands_of_oftsurgery(stored: NotebookNode) -> None:
    found = [command_parser().parse_args(words[1:]).command for words in commands(stored)]
    assert found == ["plan", "fold", "fold", "verify", "verify", "unfold", "push", "push"]


def test_its_outputs_are_of_one_run_and_small_and_name_no_place_of_a_machine(stored: NotebookNode) -> None:
    assert NOTEBOOK.stat().st_size < 100_000
    cells = code_cells(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]
    for cell in cells:
        assert not re.search(r"(?<![\w:./])/\w|[A-Z]:\\", printed(cell)), f"{cell.id} names an absolute path"


def test_its_links_lead_somewhere(stored: NotebookNode) -> None:
    texts = [cell.source for cell in stored.cells if cell.cell_type == "markdown"]
    links = [link for text in texts for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)]
    assert links
    for link in links:
        assert (NOTEBOOK.parent / link).exists(), link


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    folder: Path
    hub: Hub
    notebook: NotebookNode

    def printed(self, word: str) -> str:
        """What the only cell prints whose source has ``word``."""
        (cell,) = [cell for cell in code_cells(self.notebook) if word in cell.source]
        return printed(cell)

    def table(self, word: str) -> dict[str, str]:
        """The printed lines ``name: value`` of this cell."""
        lines = [line.partition(": ") for line in self.printed(word).splitlines()]
        return {name.strip(): value for name, _, value in lines}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("notebook")
    with serving(new_hub()) as hub:
        yield Run(folder, hub, execute(folder, hub))


@pytest.mark.slow
def test_a_run_gives_what_the_live_model_computes(run: Run) -> None:
    said = run.table("def answer(")
    assert "STOP" not in said["base"]
    assert all("STOP" in said[name] for name in ("live", "merged, bf16", "merged, NF4"))
    off = {name: float(value) for name, value in run.table("def next_tokens(").items()}
    assert off["live"] == 0
    assert off["base"] > 0.5
    assert off["merged, bf16"] < 0.02 * off["base"]
    assert off["merged, NF4"] < 0.25 * off["base"]


@pytest.mark.slow
def test_a_run_verifies_and_undoes_the_merge(run: Run) -> None:
    assert run.printed("oftsurgery verify").count("none of them wrong") == 2
    same, quantised, restored = re.findall(r"\d+", run.printed("restored, quantised").splitlines()[0])
    assert same == quantised == restored
    assert int(same) > 1000


@pytest.mark.slow
def test_a_run_pushes_the_merged_model(run: Run) -> None:
    pushed = run.hub.files(REPO)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "oftsurgery.json"):
        assert pushed[name] == (run.folder / "telegram-bf16" / name).read_bytes(), name
    assert run.printed("transformers.pipeline").strip() == run.table("def answer(")["merged, bf16"]
