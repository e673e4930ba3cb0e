"""The notebooks run from top to bottom, at a size that takes seconds; as stored they hold no outputs."""

import subprocess
import sys
import tomllib
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def run(path: Path, folder: Path, monkeypatch) -> list:
    """The cells of a notebook after a kernel in `folder` has run them all; an error in one of them is raised."""
    monkeypatch.setenv("GGSD_NOTEBOOK_SMALL", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # compiling small programs is all the work
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("JAX_DEFAULT_PRNG_IMPL", "unsafe_rbg")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook.cells


def pictures(cells: list) -> int:
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return sum("image/png" in kinds or "image/gif" in kinds for kinds in data)


def printed(cells: list) -> str:
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def test_training_on_rooms_shows_the_teacher_and_leaves_a_model(tmp_path, monkeypatch):
    cells = run(NOTEBOOKS[0], tmp_path, monkeypatch)
    assert pictures(cells) == 4
    assert "stage 2  student" in printed(cells)
    assert (tmp_path / "out/rooms/model/model.json").is_file()


def test_a_scan_is_asked_and_labelled(tmp_path, monkeypatch, model_dir):
    (tmp_path / "out/rooms").mkdir(parents=True)  # where the first notebook leaves its model
    (tmp_path / "out/rooms/model").symlink_to(model_dir)
    cells = run(NOTEBOOKS[1], tmp_path, monkeypatch)
    assert pictures(cells) == 4
    assert '"chair":' in printed(cells)
    assert (tmp_path / "room_labels.ply").is_file()


def test_sparse_convolution_explains_itself(tmp_path, monkeypatch):
    cells = run(NOTEBOOKS[2], tmp_path, monkeypatch)  # with assertions of its own
    assert pictures(cells) == 5


@each_notebook
def test_a_notebook_is_valid_and_holds_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source for cell in code if cell.outputs or cell.execution_count is not None] == []


@each_notebook
def test_the_first_cell_is_the_address_that_pyproject_states(path):
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {}).get("Repository", "")
    assert code_cells(path)[0] == f'REPOSITORY = "{stated}"  # @param {{type: "string"}}'


def test_outside_a_clone_the_second_cell_gets_one(tmp_path, monkeypatch):
    origin, elsewhere = tmp_path / "origin", tmp_path / "elsewhere"
    (origin / "ggsd_jax").mkdir(parents=True)
    elsewhere.mkdir()
    (origin / "ggsd_jax/inference.py").touch()
    (origin / "requirements.txt").write_text("numpy\n")
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=all"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=origin, check=True)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    setup = code_cells(NOTEBOOKS[0])[1]

    def execute(address):
        code = f"REPOSITORY = {address!r}\n{setup}"
        return subprocess.run([sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True)

    assert "Type into REPOSITORY" in execute("").stderr
    for _ in range(2):  # the second time it is there
        cloned = execute(f"file://{origin}")
        assert cloned.stdout == f"the code is in {elsewhere}/ggsd_jax\n", cloned.stderr


def test_all_notebooks_begin_alike():
    assert len(NOTEBOOKS) == 3 and len({tuple(code_cells(path)[:2]) for path in NOTEBOOKS}) == 1


def code_cells(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
