"""The parts of calibrated rounding against plain float64: the sweep's kernel, descent on codes, scales, the damping."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import oftsurgery
from oftsurgery.formats import codecs
from oftsurgery.formats.encoded_weight import EncodedWeight, WeightFormat
from oftsurgery.weights import sweep
from oftsurgery.weights.calibrate import DAMPINGS, best_damping, make_least
from oftsurgery.weights.descent import descend, error_of, refit
from oftsurgery.weights.sweep import Rows, damp

FORMATS = {
    "nf4": WeightFormat("nf4", (32, 192), blocksize=64),
    "nf4, double quantisation": WeightFormat("nf4", (32, 192), blocksize=64, nested_blocksize=256),
    "nf4 over rows": WeightFormat("nf4", (24, 96), blocksize=64),
    "nf4, a short last block": WeightFormat("nf4", (5, 33), blocksize=64),
    "fp4": WeightFormat("fp4", (32, 256), blocksize=128),
    "int8": WeightFormat("int8", (32, 192), torch.float16),
}


def case(name: str, tokens: int = 500) -> tuple[EncodedWeight, Tensor, Tensor, Tensor]:
    """A weight as it is stored, the exact weight, a damped Hessian, and other inputs."""
    f = FORMATS[name]
    generator = torch.Generator().manual_seed(1)
    features = f.shape[1]
    mix = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
    sizes = torch.logspace(-1, 1, features)[torch.randperm(features, generator=generator)]
    x = torch.randn(2 * tokens, features, generator=generator) * sizes @ mix
    exact = torch.randn(f.shape, generator=generator)
    seen, other = x.split(tokens)
    return codecs.encode(exact, f), exact, damp(seen.t() @ seen, 0.01), other


def error(stored: Tensor, exact: Tensor, hessian: Tensor) -> float:
    difference = stored.double() - exact.double()
    return float((difference @ hessian.double() * difference).sum())


@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_is_the_reference(name: str) -> None:
    start, exact, hessian, _ = case(name)
    rows = Rows.of(start, exact)
    fast = sweep.compensate(rows, hessian)
    with oftsurgery.use_backend("reference"):
        slow = sweep.compensate(rows, hessian)
        assert slow is not None
        assert fast is not None
        # a tie that the sums break in another way goes on along its row
        assert (fast == slow).all(1).float().mean() > 0.9
        both = [error(rows.values(numbers), exact, hessian) for numbers in (fast, slow)]
        assert both[0] == pytest.approx(both[1], rel=0.01)
        lower, _ = descend(rows, hessian, slow)
    assert (descend(rows, hessian, slow)[0] == lower).all(1).float().mean() > 0.9


@pytest.mark.parametrize("name", FORMATS)
def test_descent_goes_down_to_where_no_single_code_helps(name: str) -> None:
    start, exact, hessian, _ = case(name)
    rows = Rows.of(start, exact)
    numbers, errors = rows.numbers(start), []
    for _ in range(60):
        errors.append(error(rows.values(numbers), exact, hessian))
        before = numbers
        numbers, gradient = descend(rows, hessian, numbers, sweeps=1)
        assert error_of(rows, numbers, gradient) == pytest.approx(error(rows.values(numbers), exact, hessian), rel=1e-3)
        if torch.equal(before, numbers):
            break
    assert torch.equal(before, numbers)
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]
    # every other code of every weight, by brute force
    h, difference = hessian.double(), rows.values(numbers).double() - exact.double()
    gradient = difference @ h
    moved = rows.grid.levels.double() * rows.scales.double().unsqueeze(2) - rows.values(numbers).double().unsqueeze(2)
    change = 2 * moved * gradient.unsqueeze(2) + moved**2 * h.diagonal().reshape(1, -1, 1)
    assert change.min() > -1e-4 * float(h.diagonal().mean())


def test_descent_is_the_one_by_hand() -> None:
    start, exact, hessian, _ = case("nf4")
    rows = Rows.of(start, exact)
    h, stored, levels = hessian.double(), rows.values(rows.numbers(start)).double(), rows.grid.levels.double()
    scales, w = rows.scales.double(), exact.double()
    for _ in range(2):
        for j in torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist():
            point = stored[:, j] - ((stored - w) @ h[:, j]) / h[j, j]
            values = scales[:, j : j + 1] * levels
            stored[:, j] = values.gather(1, (values - point.unsqueeze(1)).abs().argmin(1, keepdim=True)).squeeze(1)
    got = rows.values(descend(rows, hessian, rows.numbers(start), sweeps=2)[0]).double()
    assert ((got - stored).abs() < 1e-5).all(1).double().mean() > 0.9


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_scales_are_those_of_least_squares(name: str) -> None:
    start, exact, hessian, _ = case(name)
    rows = Rows.of(start, exact)
    numbers = rows.numbers(start)
    gradient = (rows.values(numbers) - exact) @ hessian
    new = Rows.of(refit(start, rows, hessian, numbers, gradient), exact)
    # H = Cᵀ C, so the error of a row is ‖C (Σ_b s_b ℓ_b - w)‖²: numpy solves that
    c = np.linalg.cholesky(hessian.double().numpy()).T
    levels, size = rows.grid.levels[numbers].double().numpy(), rows.grid.blocksize
    for r in (0, 7, 31):
        columns = [c[:, b : b + size] @ levels[r, b : b + size] for b in range(0, exact.shape[1], size)]
        expected = np.linalg.lstsq(np.stack(columns, 1), c @ exact[r].double().numpy(), rcond=None)[0]
        assert new.scales[r, ::size].tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    assert error(new.values(numbers), exact, hessian) < error(rows.values(numbers), exact, hessian)


def test_scales_of_blocks_on_two_rows_and_of_zeros_stay() -> None:
    start, exact, hessian, _ = case("nf4 over rows")
    rows = Rows.of(start, exact)
    assert refit(start, rows, hessian, rows.numbers(start), exact) is start
    _, exact, hessian, _ = case("nf4")
    exact[3] = 0.0
    exact[4, :64] = 0.0
    start = codecs.encode(exact, FORMATS["nf4"])
    rows = Rows.of(start, exact)
    numbers = rows.numbers(start)
    new = refit(start, rows, hessian, numbers, (rows.values(numbers) - exact) @ hessian)
    assert torch.equal(new.scales.reshape(32, 3)[3], start.scales.reshape(32, 3)[3])
    assert bool(torch.isfinite(new.scales).all())


@pytest.mark.parametrize("name", FORMATS)
def test_the_whole_is_better_than_the_sweep(name: str) -> None:
    start, exact, hessian, other = case(name)
    rows = Rows.of(start, exact)
    swept = sweep.compensate(rows, damp(hessian, 0.01))
    new = make_least(exact, start, hessian, other, other @ exact.t())
    assert swept is not None
    assert new is not None
    assert new.format == start.format
    h = other.t() @ other
    assert error(codecs.decode(new), exact, h) < 0.97 * error(rows.values(swept), exact, h)


def test_few_tokens_are_damped_more() -> None:
    start, exact, _, other = case("nf4")
    few, many = other[:60], other
    _, _, _, held_out = case("nf4", tokens=500)
    held_out = held_out[60:]
    parts = [best_damping(Rows.of(start, exact), x.t() @ x, held_out, held_out @ exact.t()) for x in (few, many)]
    assert None not in parts
    assert set(parts) <= set(DAMPINGS)
    assert parts[0] > parts[1]  # type: ignore[operator]


def test_any_number_of_threads_gives_the_same() -> None:
    start, exact, hessian, other = case("nf4, double quantisation")
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            new = make_least(exact, start, hessian, other, other @ exact.t())
            assert new is not None
            found.append(new.fingerprint)
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1
