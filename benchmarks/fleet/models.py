"""The obvious model of each data set, in the units in which the data come: one task, x to y.

Each is an ordinary Pyro model, `model(x, y=None)`, with weakly informative priors and nothing
centred, scaled or otherwise made easy. Its last argument is the language that it is read in:
`references.py` reads the same lines as a NumPyro model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch


@dataclass(frozen=True)
class Language:
    """A probabilistic language: its statements, its distributions, its elementary functions."""

    sample: Callable[..., Any]
    plate: Callable[..., Any]
    dist: Any
    maths: Any


PYRO = Language(pyro.sample, pyro.plate, pyro.distributions, torch)


def _rows(ppl: Language, name: str, x: Any, law: Any, y: Any) -> Any:
    with ppl.plate("rows", x.shape[-2]):
        return ppl.sample(name, law, obs=y)


# -- normal ----------------------------------------------------------------------------------------


def radon(x, y=None, ppl=PYRO):
    """Log radon in a county's homes: x is first floor (0 or 1), log uranium."""
    sample, dist = ppl.sample, ppl.dist
    intercept = sample("intercept", dist.Normal(0.0, 5.0))
    floor = sample("floor", dist.Normal(0.0, 5.0))
    uranium = sample("uranium", dist.Normal(0.0, 5.0))
    noise = sample("noise", dist.HalfNormal(5.0))
    mean = intercept + floor * x[..., 0] + uranium * x[..., 1]
    return _rows(ppl, "log_radon", x, dist.Normal(mean, noise), y)


def sleepstudy(x, y=None, ppl=PYRO):
    """Reaction time, ms, of a subject: x is the day of short sleep."""
    sample, dist = ppl.sample, ppl.dist
    intercept = sample("intercept", dist.Normal(250.0, 100.0))
    slope = sample("slope", dist.Normal(0.0, 20.0))
    noise = sample("noise", dist.HalfNormal(50.0))
    return _rows(ppl, "reaction", x, dist.Normal(intercept + slope * x[..., 0], noise), y)


def chickweight(x, y=None, ppl=PYRO):
    """Weight, g, of a chick: x is its age in days. Every chick has a noise of its own."""
    sample, dist = ppl.sample, ppl.dist
    birth = sample("birth", dist.Normal(40.0, 50.0))
    gain = sample("gain", dist.Normal(5.0, 10.0))
    noise = sample("noise", dist.HalfNormal(30.0))
    return _rows(ppl, "weight", x, dist.Normal(birth + gain * x[..., 0], noise), y)


def gcsemv(x, y=None, ppl=PYRO):
    """Course work score, %, of a school's pupils: x is the written paper's score."""
    sample, dist = ppl.sample, ppl.dist
    intercept = sample("intercept", dist.Normal(50.0, 50.0))
    slope = sample("slope", dist.Normal(0.0, 2.0))
    noise = sample("noise", dist.HalfNormal(25.0))
    return _rows(ppl, "course", x, dist.Normal(intercept + slope * x[..., 0], noise), y)


def mathachieve(x, y=None, ppl=PYRO):
    """Mathematics score of a school's pupils: x is socio-economic status, minority (0 or 1)."""
    sample, dist = ppl.sample, ppl.dist
    intercept = sample("intercept", dist.Normal(12.0, 10.0))
    status = sample("status", dist.Normal(0.0, 5.0))
    minority = sample("minority", dist.Normal(0.0, 5.0))
    noise = sample("noise", dist.HalfNormal(10.0))
    mean = intercept + status * x[..., 0] + minority * x[..., 1]
    return _rows(ppl, "score", x, dist.Normal(mean, noise), y)


def machines(x, y=None, ppl=PYRO):
    """Productivity score of a worker: x says which of three machines (one 1, two 0)."""
    sample, dist = ppl.sample, ppl.dist
    level = sample("level", dist.Normal(60.0, 20.0).expand([3]).to_event(1))
    noise = sample("noise", dist.HalfNormal(10.0))
    return _rows(ppl, "score", x, dist.Normal((x * level).sum(-1), noise), y)


def egsingle(x, y=None, ppl=PYRO):
    """Mathematics score of a child: x is its grade, 0 (kindergarten) to 5."""
    sample, dist = ppl.sample, ppl.dist
    start = sample("start", dist.Normal(0.0, 5.0))
    growth = sample("growth", dist.Normal(0.0, 2.0))
    noise = sample("noise", dist.HalfNormal(2.0))
    return _rows(ppl, "math", x, dist.Normal(start + growth * x[..., 0], noise), y)


def rail(x, y=None, ppl=PYRO):
    """Travel time, ns (less 36,100), of ultrasound in a rail; there is no input."""
    sample, dist = ppl.sample, ppl.dist
    mean = sample("mean", dist.Normal(60.0, 50.0))
    noise = sample("noise", dist.HalfNormal(20.0))
    return _rows(ppl, "travel", x, dist.Normal(mean + 0.0 * x.sum(-1), noise), y)


def cake(x, y=None, ppl=PYRO):
    """Breaking angle, degrees, of the cakes of one batch: x is the oven's temperature, °F."""
    sample, dist = ppl.sample, ppl.dist
    intercept = sample("intercept", dist.Normal(0.0, 50.0))
    slope = sample("slope", dist.Normal(0.0, 0.5))
    noise = sample("noise", dist.HalfNormal(20.0))
    return _rows(ppl, "angle", x, dist.Normal(intercept + slope * x[..., 0], noise), y)


def grunfeld(x, y=None, ppl=PYRO):
    """Yearly investment, million $, of a firm with its own noise: x is its value, its capital."""
    sample, dist = ppl.sample, ppl.dist
    intercept = sample("intercept", dist.Normal(0.0, 200.0))
    value = sample("value", dist.Normal(0.0, 0.5))
    capital = sample("capital", dist.Normal(0.0, 0.5))
    noise = sample("noise", dist.HalfNormal(100.0))
    mean = intercept + value * x[..., 0] + capital * x[..., 1]
    return _rows(ppl, "investment", x, dist.Normal(mean, noise), y)


# -- robust ----------------------------------------------------------------------------------------


def milk(x, y=None, ppl=PYRO):
    """Protein in a cow's milk, %: x is the week since calving."""
    sample, dist = ppl.sample, ppl.dist
    intercept = sample("intercept", dist.Normal(3.5, 1.0))
    slope = sample("slope", dist.Normal(0.0, 0.2))
    spread = sample("spread", dist.HalfNormal(1.0))
    law = dist.StudentT(4.0, intercept + slope * x[..., 0], spread)
    return _rows(ppl, "protein", x, law, y)


def igf(x, y=None, ppl=PYRO):
    """Concentration of IGF-I, ng/ml, as measured with a lot of tracer: x is its age in days."""
    sample, dist = ppl.sample, ppl.dist
    intercept = sample("intercept", dist.Normal(5.0, 5.0))
    slope = sample("slope", dist.Normal(0.0, 0.2))
    spread = sample("spread", dist.HalfNormal(2.0))
    law = dist.StudentT(4.0, intercept + slope * x[..., 0], spread)
    return _rows(ppl, "conc", x, law, y)


# -- counts and proportions ------------------------------------------------------------------------


def cane(x, y=None, ppl=PYRO):
    """Ill shoots of a variety of sugar cane: x is stems planted, shoots (the trials)."""
    sample, dist = ppl.sample, ppl.dist
    intercept = sample("intercept", dist.Normal(0.0, 3.0))
    stems = sample("stems", dist.Normal(0.0, 0.5))
    law = dist.Binomial(total_count=x[..., 1], logits=intercept + stems * x[..., 0])
    return _rows(ppl, "ill", x, law, y)


def efron_morris(x, y=None, ppl=PYRO):
    """Hits of a baseball player in two parts of a season: x is times at bat (the trials)."""
    sample, dist = ppl.sample, ppl.dist
    ability = sample("ability", dist.Normal(-1.0, 1.0))
    law = dist.Binomial(total_count=x[..., 0], logits=ability)
    return _rows(ppl, "hits", x, law, y)


def mmmec(x, y=None, ppl=PYRO):
    """Deaths by melanoma in a nation's counties: x is expected deaths, UVB dose."""
    sample, dist = ppl.sample, ppl.dist
    level = sample("level", dist.Normal(0.0, 1.0))
    uvb = sample("uvb", dist.Normal(0.0, 0.5))
    rate = x[..., 0] * ppl.maths.exp(level + uvb * x[..., 1])
    return _rows(ppl, "deaths", x, dist.Poisson(rate), y)


def warpbreaks(x, y=None, ppl=PYRO):
    """Breaks of yarn on a loom with one wool and tension; there is no input."""
    sample, dist = ppl.sample, ppl.dist
    log_rate = sample("log_rate", dist.Normal(2.0, 2.0))
    return _rows(ppl, "breaks", x, dist.Poisson(ppl.maths.exp(log_rate + 0.0 * x.sum(-1))), y)


def grouseticks(x, y=None, ppl=PYRO):
    """Ticks on grouse chicks of one place: x is height, m; year 1996, year 1997 (0 or 1)."""
    sample, dist = ppl.sample, ppl.dist
    intercept = sample("intercept", dist.Normal(0.0, 20.0))
    height = sample("height", dist.Normal(0.0, 0.1))
    year_96 = sample("year_96", dist.Normal(0.0, 2.0))
    year_97 = sample("year_97", dist.Normal(0.0, 2.0))
    size = sample("size", dist.LogNormal(0.0, 1.0))
    log_mean = intercept + height * x[..., 0] + year_96 * x[..., 1] + year_97 * x[..., 2]
    law = dist.NegativeBinomial(total_count=size, logits=log_mean - ppl.maths.log(size))
    return _rows(ppl, "ticks", x, law, y)


def contraception(x, y=None, ppl=PYRO):
    """Use of contraception in a district: x is urban, age (centred in the source), children."""
    sample, dist = ppl.sample, ppl.dist
    intercept = sample("intercept", dist.Normal(0.0, 2.0))
    urban = sample("urban", dist.Normal(0.0, 2.0))
    age = sample("age", dist.Normal(0.0, 0.2))
    children = sample("children", dist.Normal(0.0, 2.0))
    logits = intercept + urban * x[..., 0] + age * x[..., 1] + children * x[..., 2]
    return _rows(ppl, "use", x, dist.Bernoulli(logits=logits), y)


def guimmun(x, y=None, ppl=PYRO):
    """Full immunisation in a community: x is child two or older, mother's school, rural, share."""
    sample, dist = ppl.sample, ppl.dist
    intercept = sample("intercept", dist.Normal(0.0, 2.0))
    older = sample("older", dist.Normal(0.0, 2.0))
    primary = sample("primary", dist.Normal(0.0, 2.0))
    rural = sample("rural", dist.Normal(0.0, 2.0))
    indigenous = sample("indigenous", dist.Normal(0.0, 2.0))
    logits = intercept + older * x[..., 0] + primary * x[..., 1]
    logits = logits + rural * x[..., 2] + indigenous * x[..., 3]
    return _rows(ppl, "immunised", x, dist.Bernoulli(logits=logits), y)


def verbagg(x, y=None, ppl=PYRO):
    """A person's "yes" to verbal aggression: x is do (not want), scold, shout, own fault."""
    sample, dist = ppl.sample, ppl.dist
    intercept = sample("intercept", dist.Normal(0.0, 2.0))
    do = sample("do", dist.Normal(0.0, 2.0))
    scold = sample("scold", dist.Normal(0.0, 2.0))
    shout = sample("shout", dist.Normal(0.0, 2.0))
    own = sample("own", dist.Normal(0.0, 2.0))
    logits = intercept + do * x[..., 0] + scold * x[..., 1] + shout * x[..., 2] + own * x[..., 3]
    return _rows(ppl, "yes", x, dist.Bernoulli(logits=logits), y)


# -- growth ----------------------------------------------------------------------------------------


def soybean(x, y=None, ppl=PYRO):
    """Leaf weight, g, of a plot's plants, logistic, log-normal noise: x is days since planting."""
    sample, dist, exp = ppl.sample, ppl.dist, ppl.maths.exp
    final = sample("final", dist.LogNormal(math.log(20.0), 0.7))
    middle = sample("middle", dist.Normal(50.0, 20.0))
    width = sample("width", dist.LogNormal(math.log(8.0), 0.5))
    noise = sample("noise", dist.HalfNormal(1.0))
    log_mean = ppl.maths.log(final) - ppl.maths.log1p(exp((middle - x[..., 0]) / width))
    return _rows(ppl, "weight", x, dist.LogNormal(log_mean, noise), y)


def orange(x, y=None, ppl=PYRO):
    """Circumference, mm, of an orange tree, logistic: x is its age in days."""
    sample, dist, exp = ppl.sample, ppl.dist, ppl.maths.exp
    final = sample("final", dist.Normal(200.0, 100.0))
    middle = sample("middle", dist.Normal(700.0, 300.0))
    width = sample("width", dist.LogNormal(math.log(350.0), 0.5))
    noise = sample("noise", dist.HalfNormal(20.0))
    mean = final / (1 + exp((middle - x[..., 0]) / width))
    return _rows(ppl, "circumference", x, dist.Normal(mean, noise), y)


def loblolly(x, y=None, ppl=PYRO):
    """Height, ft, of pines from one seed source, asymptotic growth: x is their age in years."""
    sample, dist, exp = ppl.sample, ppl.dist, ppl.maths.exp
    final = sample("final", dist.Normal(100.0, 50.0))
    start = sample("start", dist.Normal(0.0, 10.0))
    rate = sample("rate", dist.LogNormal(math.log(0.05), 1.0))
    noise = sample("noise", dist.HalfNormal(5.0))
    mean = final + (start - final) * exp(-rate * x[..., 0])
    return _rows(ppl, "height", x, dist.Normal(mean, noise), y)


# -- pharmacokinetics ------------------------------------------------------------------------------


def indometh(x, y=None, ppl=PYRO):
    """Concentration, mcg/ml, of a drug after a bolus, two compartments: x is hours."""
    sample, dist, exp = ppl.sample, ppl.dist, ppl.maths.exp
    fast = sample("fast", dist.LogNormal(math.log(2.0), 1.0))
    slow = sample("slow", dist.LogNormal(math.log(0.5), 1.0))
    slow_rate = sample("slow_rate", dist.LogNormal(math.log(0.2), 1.0))
    further_rate = sample("further_rate", dist.LogNormal(math.log(2.0), 1.0))
    noise = sample("noise", dist.HalfNormal(0.5))
    hours = x[..., 0]
    mean = (fast * exp(-further_rate * hours) + slow) * exp(-slow_rate * hours)
    return _rows(ppl, "conc", x, dist.Normal(mean, noise), y)


def cefamandole(x, y=None, ppl=PYRO):
    """Concentration, mcg/ml, of a drug, two compartments, log-normal noise: x is minutes."""
    sample, dist, exp = ppl.sample, ppl.dist, ppl.maths.exp
    fast = sample("fast", dist.LogNormal(math.log(100.0), 1.0))
    slow = sample("slow", dist.LogNormal(math.log(30.0), 1.0))
    slow_rate = sample("slow_rate", dist.LogNormal(math.log(0.01), 1.0))
    further_rate = sample("further_rate", dist.LogNormal(math.log(0.1), 1.0))
    noise = sample("noise", dist.HalfNormal(1.0))
    minutes = x[..., 0]
    log_mean = ppl.maths.log(fast * exp(-further_rate * minutes) + slow) - slow_rate * minutes
    return _rows(ppl, "conc", x, dist.LogNormal(log_mean, noise), y)


def tetracycline(x, y=None, ppl=PYRO):
    """Concentration, mcg/ml, of a drug taken by mouth, absorption of first order: x is hours."""
    sample, dist = ppl.sample, ppl.dist
    level = sample("level", dist.LogNormal(math.log(2.0), 1.0))
    elimination = sample("elimination", dist.LogNormal(math.log(0.2), 1.0))
    further_rate = sample("further_rate", dist.LogNormal(math.log(0.5), 1.0))
    noise = sample("noise", dist.HalfNormal(1.0))
    hours = x[..., 0]
    # ka (exp(-ke t) - exp(-ka t)) / (ka - ke), where ka = ke + further_rate
    taken_up = -ppl.maths.expm1(-further_rate * hours) / further_rate
    log_mean = ppl.maths.log(level * (elimination + further_rate) * taken_up) - elimination * hours
    return _rows(ppl, "conc", x, dist.LogNormal(log_mean, noise), y)


# -- positive --------------------------------------------------------------------------------------


def earthquake(x, y=None, ppl=PYRO):
    """Peak acceleration, g, at the stations that recorded a quake: x is distance, km."""
    sample, dist = ppl.sample, ppl.dist
    strength = sample("strength", dist.Normal(0.0, 2.0))
    decay = sample("decay", dist.Normal(1.0, 1.0))
    shape = sample("shape", dist.LogNormal(0.0, 1.0))
    mean = ppl.maths.exp(strength - decay * ppl.maths.log(x[..., 0]))
    return _rows(ppl, "accel", x, dist.Gamma(shape, shape / mean), y)
