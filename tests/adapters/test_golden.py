"""Adapters that peft 0.13 to 0.21 wrote, against the weights that those very releases' live layers computed."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from goldens import GOLDEN, VARIANTS, Tiny, base_of, relative
from safetensors.torch import load_file
from torch import Tensor

import oftsurgery

PATHS = ("layers.0.q_proj", "layers.0.up_proj", "layers.0.down_proj")

DIALECT = {
    "0.13.2": "peft-0.13",
    "0.15.2": "peft-0.15",
    "0.17.1": "peft-0.17",
    "0.18.1": "peft-0.21",
    "0.21.2": "peft-0.21",
}


def test_every_golden_is_here() -> None:
    assert len(VARIANTS) == 5 + 6 + 3 * 12
    assert {v.partition("/")[0].removeprefix("peft-") for v in VARIANTS} == set(DIALECT)


@pytest.mark.parametrize("inplace", [False, True], ids=["pure", "inplace"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fold_gives_what_the_release_computes(variant: str, inplace: bool) -> None:
    base, effective = base_of(variant), load_file(GOLDEN / variant / "effective.safetensors")
    model = Tiny(base)
    adapter = oftsurgery.load_adapter(GOLDEN / variant)
    assert adapter.dialect == DIALECT[variant.partition("/")[0].removeprefix("peft-")]
    assert set(adapter.modules) == set(PATHS)
    folded = oftsurgery.fold(model, adapter, inplace=inplace)
    got = dict(folded.named_parameters())
    assert got.keys() == effective.keys() == base.keys()
    for name, expected in effective.items():
        assert relative(got[name], expected) <= 1e-5, name
    for name, before in base.items():
        assert inplace or torch.equal(model.get_parameter(name), before), f"the pure fold changed its input's {name}"
    # the identity pushed through the folded model's layers: what the goldens themselves were read off by
    for path in PATHS:
        layer = folded.get_submodule(path)
        with torch.no_grad():
            out = layer(torch.eye(layer.in_features)) - (layer.bias if layer.bias is not None else 0)
        assert relative(out.t(), effective[f"{path}.weight"]) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_goldens_tell_their_rotation_from_none(variant: str) -> None:
    """The effective weights differ from the base by far more than the tolerance, but for the one-term series, which is
    the identity.
    """
    base, effective = base_of(variant), load_file(GOLDEN / variant / "effective.safetensors")
    for path in PATHS:
        distance = relative(base[f"{path}.weight"], effective[f"{path}.weight"])
        assert distance < 1e-6 if variant.endswith("neumann1") else distance > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_unfold_gives_the_base_back(variant: str) -> None:
    base = base_of(variant)
    adapter = oftsurgery.load_adapter(GOLDEN / variant)
    folded = oftsurgery.fold(Tiny(base), adapter)
    with pytest.warns(oftsurgery.UnfoldWarning, match="rotating back is not bit-exact: the largest relative error"):
        back = oftsurgery.unfold(folded, adapter)
    for name, expected in base.items():
        assert relative(back.get_parameter(name), expected) <= 1e-5, name
    exact = oftsurgery.unfold(folded, base=Tiny(base))
    assert all(torch.equal(exact.get_parameter(name), expected) for name, expected in base.items())


def independent_blocks(variant: str, path: str) -> Tensor:
    """The blocks of a golden's module in float64, from its raw file by the releases' formulas, written down once more."""
    config = json.loads((GOLDEN / variant / "adapter_config.json").read_text())
    tensors = load_file(GOLDEN / variant / "adapter_model.safetensors")
    prefix = f"base_model.model.{path}."
    effective = load_file(GOLDEN / variant / "effective.safetensors")[f"{path}.weight"]
    if prefix + "oft_r" in tensors:
        a = tensors[prefix + "oft_r"].double()
        if config["coft"]:
            width = a.shape[1] if "oft_block_size" not in config else -(-effective.shape[0] // a.shape[0])
            a = clamped(a, config["eps"] * width**2)
        q = (a - a.mT) / 2
    else:
        q = generators(tensors[prefix + "oft_R.weight"])
        if config["coft"]:
            q = clamped(q, config["eps"])
    eye = torch.eye(q.shape[-1], dtype=torch.float64).expand_as(q)
    if not config.get("use_cayley_neumann"):
        return (eye - q) @ torch.linalg.inv(eye + q)
    n = config["num_cayley_neumann_terms"]
    weights = {0: 1.0} | dict.fromkeys(range(1, n), 2.0)
    if "peft_version" in config and n >= 3:
        last = max(n - 1, 3)
        weights = {0: 1.0} | dict.fromkeys(range(1, last), 2.0) | {last: 1.0}
    return sum(w * torch.linalg.matrix_power(q, k) for k, w in weights.items())


def generators(v: Tensor) -> Tensor:
    """Rows of the upper triangle, row by row: ``v: (n, b(b-1)/2)`` → skew-symmetric ``(n, b, b)`` float64."""
    b = round((1 + (1 + 8 * v.shape[1]) ** 0.5) / 2)
    q = torch.zeros(len(v), b, b, dtype=torch.float64)
    rows, columns = zip(*itertools.combinations(range(b), 2), strict=True)
    q[:, rows, columns] = v.double()
    return q - q.mT


def clamped(m: Tensor, radius: float) -> Tensor:
    return torch.stack([block * min(1.0, radius / len(m) ** 0.5 / float(block.norm())) for block in m])


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_defect_and_angle(variant: str) -> None:
    for path, rotation in oftsurgery.load_adapter(GOLDEN / variant).modules.items():
        blocks = rotation.blocks
        expected = independent_blocks(variant, path)
        assert blocks.dtype == torch.float64
        torch.testing.assert_close(blocks, expected, rtol=0, atol=1e-12)
        gram = expected.mT @ expected - torch.eye(expected.shape[-1], dtype=torch.float64)
        assert rotation.defect == pytest.approx(float(torch.linalg.matrix_norm(gram, ord=2).max()), abs=1e-12)
        angles = torch.linalg.eigvals(expected).angle().abs()
        assert rotation.angle == pytest.approx(float(angles.max()), abs=1e-7)
        if rotation.cayley.exact:
            assert rotation.defect <= 1e-14


@pytest.mark.parametrize("release", ["0.18.1", "0.21.2"])
def test_defect_of_five_terms_has_a_closed_form(release: str) -> None:
    variant = f"peft-{release}/block16"
    exact = load_file(GOLDEN / variant / "adapter_model.safetensors")
    for path, rotation in oftsurgery.load_adapter(GOLDEN / variant).modules.items():
        q = generators(exact[f"base_model.model.{path}.oft_R.weight"])
        theta = float(torch.linalg.matrix_norm(q, ord=2).max())
        assert theta > 0.3
        assert rotation.defect == pytest.approx(2 * theta**4 - theta**8, rel=1e-12)
