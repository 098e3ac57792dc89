"""Lanczos and LOBPCG on matrices whose eigenvalues are known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_lab.eigensolvers import (
    extrapolate,
    guards,
    inner,
    lanczos,
    lanczos_top,
    lobpcg,
    missing,
)


class Counted:
    """A dense symmetric matrix as an operator on rows that counts its products."""

    def __init__(self, eigenvalues, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        size = len(eigenvalues)
        square = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.vectors = torch.linalg.qr(square)[0]
        values = torch.as_tensor(eigenvalues, dtype=torch.float64)
        self.matrix = ((self.vectors * values) @ self.vectors.T).to(dtype)
        self.values = values.sort(descending=True).values
        self.products = 0
        self.draw = lambda m: torch.randn(m, size, generator=generator, dtype=torch.float64).to(
            dtype
        )

    def __call__(self, rows):
        self.products += len(rows)
        return rows @ self.matrix


def spectra():
    value = st.floats(-10, 10).map(lambda x: round(x, 2))
    return st.lists(value, min_size=1, max_size=12)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(spectra(), st.data())
def test_lanczos_finds_the_largest_whatever_the_spectrum(values, data):
    """Tiny, zero, indefinite and with multiple eigenvalues: all of them."""
    operator = Counted(values)
    k = data.draw(st.integers(1, len(values)))
    found = lanczos_top(operator, operator.draw, k, 1e-9, 200)
    assert found.converged
    size = max(1.0, float(operator.values.abs().max()))
    torch.testing.assert_close(found.values[:k], operator.values[:k], rtol=0, atol=1e-7 * size)
    rows = found.rows[:k]
    torch.testing.assert_close(rows @ rows.T, torch.eye(k, dtype=rows.dtype), rtol=0, atol=1e-9)
    defect = rows @ operator.matrix - found.values[:k, None] * rows
    assert (defect.norm(dim=1) <= found.residuals[:k] + 1e-9 * size).all()


def test_a_space_that_closes_up_to_magnified_rounding_counts_as_closed():
    """Five different eigenvalues: the space closes at step five, but beta is 1e-12, not 1e-15."""
    operator = Counted([0.0, 2.0, 4.5, 0.0, 5.0, 6.0, 0.0, 2.0, 0.0, 6.0])
    found = lanczos_top(operator, operator.draw, 2, 1e-9, 200)
    torch.testing.assert_close(found.values[:2], torch.tensor([6.0, 6.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "values", [[0.0] * 9, [2.0] * 9, [5.0] * 4 + [1.0] * 5, [-3.0] * 6 + [-7.0]]
)
@pytest.mark.parametrize("k", [1, 3, 6])
def test_multiple_eigenvalues_are_found_with_their_multiplicity(values, k):
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        operator = Counted(values, dtype=dtype)
        found = lanczos_top(operator, operator.draw, k, 1e-2, 100)
        assert found.converged
        torch.testing.assert_close(found.values[:k], operator.values[:k], rtol=0, atol=tolerance)


def test_a_closed_krylov_space_ends_the_search_for_one_eigenvalue():
    operator = Counted([3.0] * 50 + [1.0] * 50)
    assert lanczos_top(operator, operator.draw, 1, 1e-8, 100).converged
    assert operator.products == 2


def test_lanczos_says_when_the_budget_was_too_small():
    operator = Counted(torch.linspace(0, 1, 200).tolist())
    found = lanczos_top(operator, operator.draw, 3, 1e-10, 7)
    assert not found.converged and operator.products == 7 and len(found.values) == 5


def test_the_basis_outgrows_its_first_buffer_and_stays_orthonormal():
    operator = Counted(torch.linspace(0, 1, 60).tolist(), dtype=torch.float32)
    for krylov in lanczos(operator, operator.draw):
        if len(krylov.alpha) == 40:
            break
    gram = inner(krylov.rows, krylov.rows)
    torch.testing.assert_close(gram, torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_random_starts_rarely_miss_a_near_neighbour():
    """With top eigenvalues 3% apart, a first small residual is often too early for k = 5."""
    values = torch.cat([torch.linspace(0.8, 1.0, 8), torch.linspace(-0.05, 0.3, 400)]).tolist()
    wrong = 0
    for seed in range(40):
        operator = Counted(values, seed)
        found = lanczos_top(operator, operator.draw, 5, 1e-2, 100)
        wrong += bool((found.values[:5] - operator.values[:5]).abs().max() > 1e-2)
    assert wrong <= 4


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.3])
def test_lobpcg_from_nearby_vectors(k, noise):
    values = torch.cat([torch.linspace(1, 5, 9), torch.linspace(-1, 0.8, 50)])
    operator = Counted(values.tolist())
    order = values.double().argsort(descending=True)
    exact = operator.vectors[:, order[: k + guards(k)]].T
    start = exact + noise * operator.draw(len(exact)) / len(values) ** 0.5
    found = lobpcg(operator, operator.draw, start, k, 1e-6, 500)
    assert found.converged
    torch.testing.assert_close(found.values[:k], operator.values[:k], rtol=1e-8, atol=0)
    rows = found.rows
    eye = torch.eye(len(rows), dtype=rows.dtype)
    torch.testing.assert_close(rows @ rows.T, eye, rtol=0, atol=1e-9)
    if noise == 0:
        assert operator.products == k + guards(k)


def test_lobpcg_spends_at_most_k_products_an_iteration():
    operator = Counted(torch.linspace(-1, 5, 300).tolist())
    sizes = []

    def watched(rows):
        sizes.append(len(rows))
        return operator(rows)

    found = lobpcg(watched, operator.draw, operator.draw(5), 3, 1e-3, 400)
    assert found.converged and sizes[0] == 5 and max(sizes[1:]) <= 3


def test_lobpcg_is_not_deaf_to_a_start_of_low_rank():
    operator = Counted([5.0, 4.0, 3.0, 1.0, 0.5, 0.2, 0.1, 0.0])
    row = operator.draw(1)
    for start in (torch.zeros(3, 8, dtype=torch.float64), row.repeat(3, 1), row):
        found = lobpcg(operator, operator.draw, start, 3, 1e-8, 500)
        assert found.converged
        torch.testing.assert_close(found.values[:3], operator.values[:3])


def test_lobpcg_stops_at_its_budget_and_when_it_cannot_improve():
    operator = Counted(torch.linspace(-1, 5, 300).tolist())
    found = lobpcg(operator, operator.draw, operator.draw(2), 2, 1e-12, 11)
    assert not found.converged and operator.products <= 11
    rough = Counted(torch.linspace(-1, 5, 40).tolist(), dtype=torch.float32)
    found = lobpcg(rough, rough.draw, rough.draw(2), 2, 1e-15, 500)
    assert not found.converged


def test_inner_products_are_summed_in_float64():
    ones = torch.full((1, 3_000_000), 0.1, dtype=torch.float32)
    expected = 3_000_000 * float(ones[0, 0]) ** 2
    assert float(inner(ones, ones)) == pytest.approx(expected, rel=1e-9)


def plane(angle):
    """Two orthonormal rows in 6 dimensions; the first turns towards the third axis."""
    rows = torch.zeros(2, 6, dtype=torch.float64)
    rows[0, 0], rows[0, 2] = math.cos(angle), math.sin(angle)
    rows[1, 1] = 1
    return rows


def path(*places):
    return [torch.tensor([place, 0.0], dtype=torch.float64) for place in places]


def test_a_span_that_turns_evenly_is_extrapolated_to_second_order():
    errors = []
    for step in (0.1, 0.05):
        spans = [plane(i * step) for i in range(3)]
        guess = extrapolate(path(0, step, 2 * step), spans, path(3 * step)[0], 1e-9)
        errors.append(missing(guess, plane(3 * step)))
        assert errors[-1] < 0.3 * missing(spans[-1], plane(3 * step))
    assert errors[1] < errors[0] / 3.5


def test_a_point_between_two_known_ones_is_interpolated_whatever_came_last():
    """The edge of stability: the iterate swings to the other wall and back."""
    spans = [plane(0.2), plane(-0.2), plane(0.2), plane(-0.2)]
    guess = extrapolate(path(1, -1, 1, -1), spans, path(1)[0], 1e-9)
    assert missing(guess, plane(0.2)) < 1e-6


def test_signs_and_turns_within_a_span_do_not_matter():
    c, s = math.cos(1.0), math.sin(1.0)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    plain = [plane(i * 0.1) for i in range(3)]
    turned = [turn @ plain[0], -plain[1], plain[2]]
    places, target = path(0, 1, 2), path(3)[0]
    torch.testing.assert_close(
        extrapolate(places, turned, target, 1e-6), extrapolate(places, plain, target, 1e-6)
    )


def test_spans_that_differ_by_noise_alone_are_averaged():
    generator = torch.Generator().manual_seed(0)
    noise = 0.01
    spans = [
        plane(0.0) + noise * torch.randn(2, 6, generator=generator, dtype=torch.float64) / 6**0.5
        for _ in range(4)
    ]
    # far along the line: an extrapolation that followed the noise would magnify it
    guess = extrapolate(path(0, 1, 2, 3), spans, path(9)[0], noise)
    assert missing(guess, plane(0.0)) < 2 * noise


@pytest.mark.parametrize("target", [0.0, float("inf"), float("nan")])
def test_an_extrapolation_without_moves_or_numbers_is_the_last_span(target):
    spans = [plane(0.1), plane(0.0)]
    where = path(0, 0) if target == 0.0 else path(0, 1)
    guess = extrapolate(where, spans, path(target)[0], 1e-3)
    assert torch.isfinite(guess).all()
    assert missing(guess, plane(0.0)) <= missing(spans[0], plane(0.0)) + 1e-12


def test_what_is_missing_is_a_sine():
    assert missing(plane(0.0)[:1], plane(0.3)[:1]) == pytest.approx(math.sin(0.3))
    assert missing(plane(0.0), plane(0.0)) == 0.0


@pytest.mark.parametrize("k", [1, 3])
def test_the_rows_ahead_are_nearer_than_the_certified_ones(k):
    values = torch.cat([torch.linspace(3, 5, 6), torch.linspace(-0.5, 0.5, 60)])
    operator = Counted(values.tolist())
    order = values.double().argsort(descending=True)
    exact = operator.vectors[:, order[: k + guards(k)]].T
    start = exact + 0.3 * operator.draw(len(exact)) / len(values) ** 0.5
    found = lobpcg(operator, operator.draw, start, k, 2e-2, 500)
    assert found.converged
    before, after = (missing(rows, exact[:k]) for rows in (found.rows, found.ahead))
    assert after < 0.7 * before
