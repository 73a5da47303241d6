"""Where tokens of a grid lie, in their own steps or in those of another grid over the same image."""

import pytest
import torch

from fourmill.core.positions import grid_positions


@pytest.mark.parametrize("centred", [False, True])
def test_a_grid_in_its_own_units_is_the_public_table(centred: bool) -> None:
    table = grid_positions(16, 8, 10.0, centred)
    assert torch.equal(grid_positions(16, 8, 10.0, centred, units=8), table)
    assert table.shape == (1, 64, 16)
    if not centred:
        assert table[0, 8 * 3 + 5, 0] == pytest.approx(torch.sin(torch.tensor(3.0)).item(), abs=1e-6)


def test_tokens_of_a_smaller_grid_lie_amid_the_large_ones_that_they_cover() -> None:
    small, large = grid_positions(32, 4, 10.0, True, units=8)[0], grid_positions(32, 8, 10.0, True)[0]
    for row in range(4):
        for column in range(4):
            distances = (large - small[row * 4 + column]).norm(dim=1).view(8, 8)
            nearest = {divmod(int(i), 8) for i in distances.flatten().argsort()[:4]}
            assert nearest == {(2 * row + i, 2 * column + j) for i in (0, 1) for j in (0, 1)}
