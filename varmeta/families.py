"""The laws of formula models: what they need, and how they are written in Pyro.

The default priors are weakly informative in the units of the data. Coefficients are
N(0, 2.5 sd(y) / sd(x)), σ is exponential with mean sd(y), as in rstanarm (Gabry & Goodrich 2020,
"Prior distributions for rstanarm models"); sd(y) is 1 on the scale of a log or a logit. The
intercept is around the mean of y there (as in brms, Bürkner 2017), wider by what the other terms
move it where they are not centred (as in Bambi, Capretto et al. 2022). ν ~ Gamma(2, 0.1) is of
Juárez & Steel (2010); the inverse gamma of a precision is that of brms for the negative binomial.
For a term that varies by group the same prior says where the mean and the standard deviation of the
groups' values start, which are learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_PRECISION = "dist.InverseGamma(0.4, 0.3)"


@dataclass(frozen=True)
class Family:
    """One law.

    Attributes:
        link: which function of the law's mean is linear in the terms.
        law: of the rows, in Python, given `eta` (the linear predictor) and what `before` makes.
        extra: further latents, name and prior, one value for all groups; `{rate}` is
            1 / sd(y), `{gaps}` the number of classes less 2.
        before: a line that computes what the law needs.
        response: what it wants to see, in words.
        classes: whether the response is a class: its levels are numbered from 0.
    """

    link: Literal["identity", "log", "logit", "classes"]
    law: str
    extra: tuple[tuple[str, str], ...] = ()
    before: str = ""
    response: str = "numbers"
    classes: bool = False


FAMILIES = {
    "normal": Family(
        "identity", "dist.Normal({eta}, sigma)", (("sigma", "dist.Exponential({rate})"),)
    ),
    "student": Family(
        "identity",
        "dist.StudentT(nu, {eta}, sigma)",
        (("sigma", "dist.Exponential({rate})"), ("nu", "dist.Gamma(2.0, 0.1)")),
    ),
    "bernoulli": Family(
        "logit", "dist.Bernoulli(logits={eta})", response="0 and 1, truths, or two levels"
    ),
    "binomial": Family(
        "logit",
        "dist.Binomial(total_count={trials}, logits={eta})",
        response="whole numbers from 0 to the number of trials",
    ),
    "poisson": Family("log", "dist.Poisson({eta}.exp())", response="whole numbers from 0"),
    "negative-binomial": Family(
        "log",
        "dist.NegativeBinomial(shape, logits={eta} - shape.log())",  # mean exp(eta)
        (("shape", _PRECISION),),
        response="whole numbers from 0",
    ),
    "beta": Family(
        "logit",
        "dist.Beta(mean * precision, (1 - mean) * precision)",
        (("precision", _PRECISION),),
        "mean = {eta}.sigmoid()",
        "numbers between 0 and 1, without both",
    ),
    "ordinal": Family(
        "logit",
        "dist.OrderedLogistic({eta}, cutpoints)",
        (("gaps", "dist.LogNormal(0.0, 1.0).expand([{gaps}]).to_event(1)"),),
        "cutpoints = torch.nn.functional.pad(gaps.cumsum(-1), (1, 0))  # the first is 0",
        "levels in their order",
        True,
    ),
    "categorical": Family(
        "classes",
        "dist.Categorical(logits=torch.nn.functional.pad({eta}, (1, 0)))",  # the first is 0
        response="levels",
        classes=True,
    ),
}
