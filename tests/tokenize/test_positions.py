import pytest
import torch

from fourmill.tokenize.positions import fit_positions, stored_positions


def test_worked_values_of_the_public_table():
    table = stored_positions(8, 14)[0].flatten(1).T
    assert torch.allclose(table[1], torch.tensor([0, 0, 1, 1, 0.84147, 0.01, 0.5403, 0.99995]), atol=1e-5)
    assert torch.allclose(table[14], torch.tensor([0.84147, 0.01, 0.5403, 0.99995, 0, 0, 1, 1]), atol=1e-5)
    with pytest.raises(ValueError, match="multiple of 4"):
        stored_positions(6, 2)


def test_another_grid_is_interpolated_not_computed_anew():
    stored = stored_positions(16, 28)
    assert fit_positions(stored, 28, 28) is stored
    smaller = fit_positions(stored, 14, 14)
    assert smaller.shape == (1, 16, 14, 14)
    assert not torch.allclose(smaller, stored_positions(16, 14), atol=0.1)
    # The slowest sine is nearly linear: in the middle of the first coarse cell it has the value of half a fine step.
    assert smaller[0, 3, 6, 0] == pytest.approx(float(stored[0, 3, 12:14, 0].mean()), abs=1e-3)
