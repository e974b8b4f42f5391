"""The schedule of resets, and the table they act on."""

from __future__ import annotations

import pytest
import torch

from varmeta.inference.resets import Reset
from varmeta.inference.table import descend, new_table, reset


def test_the_schedule() -> None:
    assert Reset(3).times(10) == (3, 6, 9)
    assert Reset(3).times(9) == (3, 6)
    assert Reset(3, until=6).times(20) == (3, 6)
    assert Reset(10, growth=2.0).times(200) == (10, 30, 70, 150)
    assert Reset(2, growth=1.5).times(20) == (2, 5, 10, 16)  # 2, 5, 9.5, 16.25


def test_a_cycle_goes_from_a_tasks_own_reset_to_its_next() -> None:
    everyone, half = Reset(10), Reset(10, fraction=0.5)

    def phases(schedule: Reset, steps: int, task: int, at: tuple[int, ...]) -> list[float]:
        return [float(schedule.phases(s, steps, 4)[task]) for s in at]

    assert phases(everyone, 35, 0, (0, 5, 10, 29, 30, 34)) == [0, 0.5, 0, 0.9, 0, 0.8]
    assert phases(everyone, 35, 3, (5, 10)) == [0.5, 0]
    # The first two tasks at 10 and 30, the other two at 20, of 40 steps.
    assert phases(half, 40, 1, (5, 10, 20, 29, 35)) == [0.5, 0, 0.5, 0.95, 0.5]
    assert phases(half, 40, 2, (10, 20, 30)) == [0.5, 0, 0.5]


@pytest.mark.parametrize("fraction", [1.0, 0.7, 0.5, 0.4, 1 / 3, 0.1, 0.01])
@pytest.mark.parametrize("tasks", [1, 7, 20])
def test_each_reset_takes_its_share_and_starves_nobody(fraction: float, tasks: int) -> None:
    visited = torch.zeros(tasks)
    for number in range(100):
        which = Reset(5, fraction=fraction).which(number, tasks)
        assert abs(int(which.sum()) - fraction * tasks) < 1
        visited[which] += 1
        assert abs(float(visited.sum()) - (number + 1) * fraction * tasks) <= 1
        assert float((visited - (number + 1) * fraction).abs().max()) <= 1 + 1e-6
    assert (
        float(visited.min()) >= int(100 * fraction + 1e-9) and visited.max() <= 101 * fraction + 1
    )


def test_rows_move_part_of_the_way_and_forget_as_much() -> None:
    table = new_table(torch.zeros(2), 4)
    everyone = torch.arange(4)
    for _ in range(3):
        descend(table, everyone, torch.ones(4, 2), torch.full((4,), 0.1))
    before = {name: t.clone() for name, t in table.items()}
    reset(table, torch.arange(4) % 2 == 0, torch.tensor([1.0, 2.0]), 0.25)
    expected = before["rows"][0] + 0.25 * (torch.tensor([1.0, 2.0]) - before["rows"][0])
    assert torch.allclose(table["rows"][::2], expected)
    assert torch.allclose(table["momentum"][::2], 0.75 * before["momentum"][::2])
    assert torch.equal(table["visits"], before["visits"])
    for name, now in table.items():
        assert torch.equal(now[1::2], before[name][1::2])
    reset(table, torch.arange(4) % 2 == 1, torch.zeros(2), 1.0)
    for now in table.values():
        assert not now[1::2].any()


def test_a_row_moves_as_under_pytorchs_adam_whatever_the_others_do() -> None:
    """Row 1 is visited at every third step only."""
    gradients = torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(0))
    table = new_table(torch.zeros(3), 2)
    alone = [torch.zeros(3, requires_grad=True) for _ in range(2)]
    adams = [torch.optim.Adam([t], lr=0.1, betas=(0.9, 0.95)) for t in alone]
    for step, grad in enumerate(gradients):
        index = torch.tensor([0, 1] if step % 3 == 0 else [0])
        descend(table, index, grad[index], torch.full((len(index),), 0.1))
        for i in index.tolist():
            alone[i].grad = grad[i]
            adams[i].step()
    torch.testing.assert_close(table["rows"], torch.stack(alone).detach())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be .* at least 1, got 0"),
        ({"every": 2, "fraction": 0.0}, "fraction must be above 0 and at most 1, got 0"),
        ({"every": 2, "amount": 1.5}, "amount must be above 0 and at most 1, got 1.5"),
        ({"every": 2, "growth": 0.5}, "growth must be .*at least 1, got 0.5"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reset(**arguments)  # type: ignore[arg-type]
