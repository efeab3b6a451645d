"""The public surface, what importing it costs, and what happens without the dependencies that it can do without."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import oftsurgery


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_torch_and_safetensors_only() -> None:
    out = python(
        "import sys, torch\nbefore = {m.partition('.')[0] for m in sys.modules}\nimport oftsurgery\n"
        "print(*sorted({m.partition('.')[0] for m in sys.modules} - before - set(sys.stdlib_module_names)))"
    )
    assert set(out.split()) <= {"oftsurgery", "safetensors"}, "beyond torch and safetensors"


@pytest.mark.parametrize(
    ("release", "code"), [("5.20.4", 3), ("4.57.6", 3), ("5.21.0", 2), ("5.21rc1", 2), ("6.0.0.dev0", 2), (None, 2)]
)
def test_an_old_transformers_is_refused_in_one_line(release: str | None, code: int, tmp_path: Path) -> None:
    if release is not None:
        (tmp_path / f"transformers-{release}.dist-info").mkdir()
        (tmp_path / f"transformers-{release}.dist-info" / "METADATA").write_text(
            f"Name: transformers\nVersion: {release}\n"
        )
    run = [sys.executable, "-m", "oftsurgery", "fold", str(tmp_path / "base"), str(tmp_path / "adapter"), "out"]
    done = subprocess.run(
        run, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    told = f"oftsurgery: MissingDependencyError: transformers {release} is installed, but oftsurgery needs 5.21 or newer Remedy: "
    assert (done.stderr == f"{told}pip install --upgrade 'transformers>=5.21'\n") == (code == 3), done.stderr


def test_the_oldest_transformers_is_the_one_that_the_package_names() -> None:
    oldest = ".".join(map(str, oftsurgery._TRANSFORMERS))
    assert f'"transformers>={oldest}"' in (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")


def test_a_dense_fold_needs_no_bitsandbytes_peft_or_hub(tmp_path: Path, write_adapter: Callable[..., Path]) -> None:
    folder = write_adapter({"base_model.model.0.oft_R.weight": torch.full((2, 28), 0.05)})
    python(
        "import sys\nfor name in ('bitsandbytes', 'peft', 'transformers', 'accelerate', 'huggingface_hub', 'tqdm'): sys.modules[name] = None\n"
        "import oftsurgery, torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(16, 4))\n"
        f"folded = oftsurgery.fold(model, {str(folder)!r})\n"
        "assert not torch.equal(folded[0].weight, model[0].weight)\n"
    )


def test_a_hub_id_without_huggingface_hub_says_what_to_install(tmp_path: Path) -> None:
    out = python(
        "import sys\nsys.modules['huggingface_hub'] = None\nimport oftsurgery\n"
        "try: oftsurgery.load_adapter('owner/name')\n"
        "except oftsurgery.MissingDependencyError as error: print(isinstance(error, ImportError), error)"
    )
    assert (
        out.strip()
        == "True huggingface-hub is not installed Remedy: pip install huggingface-hub, or give a local folder"
    )


def test_each_public_docstring_begins_with_an_example() -> None:
    for name in oftsurgery.__all__:
        thing = getattr(oftsurgery, name)
        if (inspect.isfunction(thing) or inspect.isclass(thing)) and not (
            inspect.isclass(thing) and issubclass(thing, Exception)
        ):
            first, _, rest = (inspect.getdoc(thing) or "").partition("\n\n")
            assert first.endswith("."), name
            assert rest.startswith(">>> "), f"{name}: no example after the first sentence"


def test_all_names_what_is_there() -> None:
    assert sorted(set(oftsurgery.__all__)) == sorted(oftsurgery.__all__)
    missing = [name for name in oftsurgery.__all__ if not hasattr(oftsurgery, name)]
    assert not missing
    public = {
        name
        for name, value in vars(oftsurgery).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert public <= set(oftsurgery.__all__)


@pytest.mark.slow
def test_type_checkers_see_what_a_public_name_is(tmp_path: Path) -> None:
    names = sorted(set(oftsurgery.__all__))
    user = "import oftsurgery\nfrom oftsurgery import " + ", ".join(names) + "\n"
    user += "reveal_type(oftsurgery.live.Linear4bit)\n" + "".join(f"reveal_type({name})\n" for name in names)
    (tmp_path / "user.py").write_text(user, encoding="utf-8")
    checked = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--ignore-missing-imports", "user.py"]
    done = subprocess.run(checked, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("Revealed type is") == len(names) + 1
    assert 'Revealed type is "Any"' not in done.stdout


@pytest.mark.parametrize("name", sorted(set(oftsurgery.__all__) - {"__version__"}))
def test_public_names_have_docstrings(name: str) -> None:
    value = getattr(oftsurgery, name)
    if not callable(value):
        return
    assert (value.__doc__ or "").strip()
    # a dataclass without a docstring gets its signature as one
    assert not value.__doc__.startswith(f"{name}(")


def test_version() -> None:
    from importlib import metadata

    assert oftsurgery.__version__ == metadata.version("oftsurgery")


def test_the_package_is_typed() -> None:
    assert (Path(oftsurgery.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", ["fold", "unfold", "load_adapter", "fold_weight", "unfold_weight"])
def test_options_are_keywords(name: str) -> None:
    """Beyond the natural positional arguments of each function, so that options can be added."""
    positional = [
        p.name
        for p in inspect.signature(getattr(oftsurgery, name)).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert positional == {
        "fold": ["model", "adapter"],
        "unfold": ["folded", "adapter"],
        "load_adapter": ["path_or_repo"],
        "fold_weight": ["weight", "rotation"],
        "unfold_weight": ["weight", "rotation"],
    }[name]  # fmt: skip
