"""Schedules: where along the timesteps a patch acts."""

from __future__ import annotations

import math

import pytest
import torch

from dmp_common import PatchError, Schedule, Settings
from tests.dmp_common.attaching import SD15, close, make


def factors(schedule: Schedule, *timesteps: float) -> list[float]:
    return schedule.factors(torch.tensor(timesteps)).tolist()


def test_default_acts_everywhere() -> None:
    assert Schedule().always
    assert Schedule.from_percent().always
    assert factors(Schedule(), 0.0, 500.0, 1000.0, 1e6) == [1.0] * 4


def test_range_is_inclusive() -> None:
    schedule = Schedule(first=800.0, last=200.0)
    assert factors(schedule, 801.0, 800.0, 500.0, 200.0, 199.0) == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_percent_runs_from_noise_to_picture() -> None:
    first_half = Schedule.from_percent(0.0, 0.5)
    assert factors(first_half, 1000.0, 999.9, 500.0, 499.9, 0.0) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert (first_half.first, first_half.last) == (math.inf, 500.0)


def test_ends_stay_open_whatever_the_rule_gives() -> None:
    """A host's last timestep may lie below what its rule gives for 100 %."""
    schedule = Schedule.from_percent(0.0, 1.0, [(0.0, 1.0), (1.0, 2.0)], lambda p: 900 - 800 * p)
    assert factors(schedule, 1000.0, 900.0, 500.0, 100.0, 0.0) == [1.0, 1.0, 1.5, 2.0, 2.0]


def test_curve_is_interpolated_and_held() -> None:
    schedule = Schedule(curve=((250.0, 2.0), (750.0, 0.0), (500.0, 1.0)))  # any order
    assert factors(schedule, 1000.0, 750.0, 625.0, 500.0, 375.0, 250.0, 0.0) == [
        0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.0,
    ]  # fmt: skip


def test_two_points_at_one_timestep_are_a_step() -> None:
    schedule = Schedule(curve=((0.0, 1.0), (500.0, 1.0), (500.0, 3.0), (1000.0, 3.0)))
    assert factors(schedule, 499.0, 500.0, 501.0) == [1.0, 3.0, 3.0]


@pytest.mark.parametrize("points", [((0.5, 1.0), (0.5, 0.0)), ((0.5, 0.0), (0.5, 1.0))])
def test_a_step_keeps_the_order_of_progress(points: tuple[tuple[float, float], ...]) -> None:
    """Switched off half-way, and switched on half-way: the first point is the noisier side."""
    schedule = Schedule.from_percent(curve=points)
    assert factors(schedule, 600.0, 400.0) == [points[0][1], points[1][1]]


def test_single_point_is_a_constant() -> None:
    assert factors(Schedule(curve=((500.0, 0.3),)), 0.0, 1000.0) == [0.3, 0.3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(first=100.0, last=200.0), "upside|starts before it ends"),
        (lambda: Schedule(first=math.nan), "starts before it ends"),
        (lambda: Schedule(curve=((0.0, math.inf),)), "finite"),
        (lambda: Schedule.from_percent(0.7, 0.3), "swap"),
        (lambda: Schedule.from_percent(-0.1, 1.0), "0 to 1, found -0.1"),
        (lambda: Schedule.from_percent(0.0, 1.0, [(1.5, 1.0)]), "0 to 1, found 1.5"),
        (lambda: Settings(strength=math.nan), "finite strength"),
        (lambda: Settings(temperature=0.0), "temperature"),
    ],
)
def test_nonsense_is_refused(make: object, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        make()  # type: ignore[operator]


def test_strengths_of_a_batch() -> None:
    half = Settings(strength=2.0, schedule=Schedule(last=500.0))
    mixed = half.strengths(torch.tensor([900.0, 100.0]))
    assert isinstance(mixed, torch.Tensor)
    assert mixed.tolist() == [2.0, 0.0]
    assert half.strengths(torch.tensor([900.0, 800.0])) == 2.0
    assert half.strengths(torch.tensor([100.0, 200.0])) == 0.0
    assert Settings(strength=0.5).strengths(None) == 0.5
    with pytest.raises(PatchError, match="needs the timesteps"):
        half.strengths(None)
    assert Settings().strengths(torch.tensor([500.0, 499.0]), (0, 500)).tolist() == [0.0, 1.0]
    assert Settings().strengths(torch.tensor([1000.0]), (500, 1000)) == 1.0
    with pytest.raises(PatchError, match="a part of the timesteps, needs the timesteps"):
        Settings().strengths(None, (0, 500))


@pytest.mark.skipif(torch.__version__ < (2, 4), reason="older compilers need several graphs")
@pytest.mark.parametrize("within", [(0, 1000), (0, 500)])
def test_a_context_made_in_compiled_code_follows_the_schedule(within: tuple[int, int]) -> None:
    """ComfyUI's compiled UNets make it so. Two graphs instead of one, and the patch may be lost."""
    patch = make(SD15, sites="all", timesteps=within)
    site = patch.base.sites[0]
    settings = Settings(strength=0.5, schedule=Schedule(last=100.0, curve=((0, 0.0), (1000, 1.0))))

    def add(e: torch.Tensor, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return patch.prepare(e, None, settings, timesteps=timesteps).add(site.name, x)

    torch._dynamo.reset()
    compiled = torch.compile(add, backend="eager", fullgraph=True)
    e, x = torch.randn(2, patch.base.embedding), torch.randn(2, site.width, 8, 8)
    with torch.no_grad():
        for pair in ([900.0, 300.0], [450.0, 450.0], [50.0, 50.0]):
            timesteps = torch.tensor(pair)
            assert close(compiled(e, x, timesteps), add(e, x, timesteps))
    torch._dynamo.reset()
