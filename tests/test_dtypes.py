"""The one table of dtypes: each column against torch and the safetensors library themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from oftsurgery import StateError, dtype_names, dtypes
from oftsurgery.cli import arguments


def test_names_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    save_file({name: torch.zeros(2).to(dtype) for name, dtype in dtypes.DTYPES.items()}, tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        assert {name: file.get_slice(name).get_dtype() for name in file.keys()} == {n: n for n in dtypes.DTYPES}  # noqa: SIM118


def test_each_column_is_the_mirror_of_its_other() -> None:
    assert {dtypes.DTYPES[name]: name for name in dtypes.DTYPES} == dtypes.DTYPE_NAMES
    assert {dtypes.DENSE[name]: name for name in dtypes.DENSE} == dtypes.FORMAT_OF
    assert all(getattr(torch, name) == dtype for name, dtype in dtypes.NAMED.items())
    assert set(dtypes.DENSE.values()) < set(dtypes.FLOATS) < set(dtypes.NAMED.values()) < set(dtypes.DTYPE_NAMES)


def test_the_command_line_offers_those_there_are() -> None:
    assert tuple(map(dtype_names.name_of, dtypes.DENSE.values())) == arguments.DTYPES
    assert [dtypes.float_dtype(name) for name in arguments.DTYPES] == list(dtypes.DENSE.values())
    assert set(dtypes.DENSE) < set(arguments.FORMATS)


@pytest.mark.parametrize("name", ["float64", "int8", "torch.float32", "fp32", ""])
def test_a_name_of_no_dense_format_is_refused(name: str) -> None:
    with pytest.raises(StateError, match=f"unknown dtype '{name}' Remedy: use float32, float16 or bfloat16"):
        dtypes.float_dtype(name)
