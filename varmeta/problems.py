"""The shipped data sets as problems to compare on: data, model, and what to hold out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from torch import Tensor

from varmeta.data import load
from varmeta.models.density import Density
from varmeta.models.sites import Model
from varmeta.tasks import Tasks


@dataclass(frozen=True)
class Problem:
    """A comparison's input.

    Attributes:
        density: the model.
        train: training tasks; query rows are held out.
        new: tasks held out whole, split; None without.
    """

    density: Density
    train: Tasks
    new: Tasks | None

    @classmethod
    def make(
        cls,
        model: Model,
        tasks: Tasks,
        *,
        shared: list[str] | None = None,
        query: float = 0.3,
        hold_out: int = 0,
        seed: int = 0,
    ) -> Problem:
        """Split every task, set `hold_out` whole tasks aside.

        Args:
            model: a Pyro model of one task.
            tasks: all of them.
            shared: latents with one value for all tasks.
            query: share of each task's rows that is held out; 0 for none.
            hold_out: number of whole tasks that is held out.
            seed: of both.
        """
        density = Density(model, tasks, shared=shared or [])
        split = tasks.split(query, seed=seed) if query else tasks
        if not hold_out:
            return cls(density, split, None)
        train, new = split.hold_out(hold_out, seed=seed)
        return cls(density, train, new)


def county(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Radon in the homes of one county: x is (first floor?, log uranium), y is log radon."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    floor = pyro.sample("floor", dist.Normal(0.0, 5.0))
    uranium = pyro.sample("uranium", dist.Normal(0.0, 5.0))
    noise = pyro.sample("noise", dist.HalfNormal(5.0))
    mean = intercept + floor * x[..., 0] + uranium * x[..., 1]
    with pyro.plate("homes", x.shape[-2]):
        return pyro.sample("log_radon", dist.Normal(mean, noise), obs=y)


def subject(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Reaction times (ms) of one subject over days of short sleep."""
    intercept = pyro.sample("intercept", dist.Normal(250.0, 100.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 20.0))
    noise = pyro.sample("noise", dist.HalfNormal(50.0))
    with pyro.plate("days", x.shape[-2]):
        return pyro.sample("reaction", dist.Normal(intercept + slope * x[..., 0], noise), obs=y)


def school(x: Tensor, y: Tensor | None = None) -> Tensor:
    """One school's estimated coaching effect, with its known standard error as x."""
    effect = pyro.sample("effect", dist.Normal(0.0, 10.0))
    with pyro.plate("estimates", x.shape[-2]):
        return pyro.sample("estimate", dist.Normal(effect, x[..., 0]), obs=y)


def radon(seed: int = 0) -> Problem:
    """919 homes in 85 Minnesota counties; 30% of each county's homes and 15 counties held out."""
    tasks = Tasks.from_frame(
        load("radon"), task="county", inputs=["floor", "log_uranium"], target="log_radon"
    )
    return Problem.make(county, tasks, shared=["uranium", "noise"], hold_out=15, seed=seed)


def sleepstudy(seed: int = 0) -> Problem:
    """180 reaction times of 18 subjects; 30% of each subject's days and 4 subjects held out."""
    tasks = Tasks.from_frame(load("sleepstudy"), task="subject", inputs=["days"], target="reaction")
    return Problem.make(subject, tasks, shared=["noise"], hold_out=4, seed=seed)


def eight_schools(seed: int = 0) -> Problem:
    """Eight schools with one estimate each, so that nothing can be held out."""
    tasks = Tasks.from_frame(load("eight_schools"), task="school", inputs=["se"], target="effect")
    return Problem.make(school, tasks, query=0.0, seed=seed)


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "eight_schools": eight_schools,
    "radon": radon,
    "sleepstudy": sleepstudy,
}
