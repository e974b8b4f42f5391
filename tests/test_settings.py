"""Settings of strategies from the shell and from a TOML file."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyro.infer.autoguide import AutoMultivariateNormal

from varmeta import (
    IMAML,
    SGD,
    Adam,
    CompletePooling,
    JointVariational,
    Reset,
    Score,
    Stochastic,
    Strategy,
)
from varmeta.settings import STRATEGIES, choose, described, table_names


def one(name: str, *settings: str) -> Strategy:
    return choose([name], settings=settings)[name]


def test_what_is_set_is_set_and_nothing_else() -> None:
    joint = JointVariational
    pairs: list[tuple[Strategy, Strategy]] = [
        (one("joint", "joint.q=full"), joint(q="full")),
        (one("joint", "joint.q='full'"), joint(q="full")),
        (one("joint", "joint.steps = 7"), joint(steps=7)),
        (one("joint", "joint.learning_rate=1"), joint(learning_rate=1.0)),
        (one("joint-reset", "joint-reset.resets=None"), joint()),
        (one("joint", "joint.resets=Reset(9, fraction=0.5)"), joint(resets=Reset(9, 0.5))),
        (one("joint-reset", "joint-reset.resets.every=4"), joint(resets=Reset(4))),
        (one("imaml", "imaml.warm_start=true"), IMAML(warm_start=True)),
        (one("imaml", "imaml.minimiser=Adam(0.1, 10)"), IMAML(minimiser=Adam(0.1, 10))),
        (one("stochastic", "stochastic.algorithm=SGD()"), Stochastic(SGD())),
        (one("stochastic", "stochastic.estimator=Score()"), Stochastic(estimator=Score())),
    ]
    for found, wanted in pairs:
        assert repr(found) == repr(wanted)
    svi = one("svi", "svi.guide=AutoMultivariateNormal")
    assert svi.guide is AutoMultivariateNormal  # type: ignore[attr-defined]


def test_parts_of_parts() -> None:
    found = one("imaml", "imaml.minimiser.max_iterations=70", "imaml.adjoint.solver.tolerance=0")
    assert isinstance(found, IMAML)
    assert found.minimiser.max_iterations == 70  # type: ignore[attr-defined]
    assert found.adjoint.solver.tolerance == 0  # type: ignore[attr-defined]
    assert described(found).endswith(
        "minimiser=NewtonCG(max_iterations=70), adjoint=Implicit(solver=CG(tolerance=0)))"
    )


def test_settings_that_need_each_other_are_set_at_once() -> None:
    """Each of the two by itself would be refused by the strategy."""
    name = "amortised"
    with pytest.raises(ValueError, match=r"--set amortised.q=laplace: .*"):
        one(name, "amortised.q=laplace")
    both = one(name, "amortised.gradient=implicit", "amortised.q=laplace")
    assert (both.q, both.gradient) == ("laplace", "implicit")  # type: ignore[attr-defined]


def test_limits_for_all_and_what_outweighs_them(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("[maml]\nsteps = 20\n[joint]\nsteps = 20\n")
    found = choose(
        ["imaml", "maml", "joint", "complete-pooling"],
        steps=10,
        tolerance=0.5,
        settings=["joint.steps=30"],
        config=config,
    )
    assert [getattr(s, "steps", None) for s in found.values()] == [10, 20, 30, None]
    assert [getattr(found[n], "tolerance", 0.5) for n in found] == [0.5] * 4
    assert found["complete-pooling"] == CompletePooling()


def test_a_file_means_the_same_as_the_shell_and_adds_names(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text(
        """
        [joint]
        q = "full"
        resets = "Reset(5)"
        [imaml.minimiser]
        max_iterations = 70
        [tight]
        strategy = "joint"
        steps = 50
        ["[/x]"]
        strategy = "imaml"
        """
    )
    found = choose(["imaml", "joint"], config=config, settings=["tight.q=delta"])
    assert list(found) == ["imaml", "joint", "tight", "[/x]"]
    assert found["joint"] == one("joint", "joint.q=full", "joint.resets=Reset(5)")
    assert found["imaml"] == one("imaml", "imaml.minimiser.max_iterations=70")
    assert found["tight"] == JointVariational(steps=50, q="delta")
    names = list(table_names(found))
    assert names == ["imaml", found["joint"].name, "tight", "[/x]"]  # two would be called IMAML
    assert list(table_names(choose(["imaml"]))) == ["IMAML"]


def test_described_says_the_limit_and_what_is_not_default() -> None:
    assert described(JointVariational(q="full")) == "JointVariational(q='full', steps=1000)"
    assert described(CompletePooling()) == "CompletePooling()"
    for make in STRATEGIES.values():
        assert type(make()).__name__ in described(make())


@pytest.mark.parametrize(
    ("arguments", "pieces"),
    [
        ({"settings": ["joint.q"]}, ["--set joint.q: wanted NAME.FIELD=VALUE"]),
        ({"settings": ["joint=3"]}, ["--set joint=3: wanted NAME.FIELD=VALUE"]),
        (
            {"settings": ["joint.q=round"]},
            ["--set joint.q=round", "'delta', 'diagonal'", "'round'"],
        ),
        ({"settings": ["joint.steps=many"]}, ["joint.steps must be a whole number, got 'many'"]),
        ({"settings": ["joint.steps=2.5"]}, ["joint.steps must be a whole number, got 2.5"]),
        ({"settings": ["joint.steps=True"]}, ["joint.steps must be a whole number, got True"]),
        ({"settings": ["joint.learning_rate=fast"]}, ["must be a number, got 'fast'"]),
        ({"settings": ["joint.shift=maybe"]}, ["must be True or False, got 'maybe'"]),
        (
            {"settings": ["joint.tempo=1"]},
            ["JointVariational) has no field 'tempo'", "q, rank, steps"],
        ),
        ({"settings": ["magic.q=1"]}, ["no strategy 'magic'; there are: joint, imaml"]),
        ({"settings": ["maml.steps=1"]}, ["'maml' is not among", "add it to --strategies"]),
        (
            {"settings": ["imaml.minimiser=fast"]},
            ["imaml.minimiser must be one of", "NewtonCG(…)", "got 'fast'"],
        ),
        ({"settings": ["imaml.minimiser=Adam(0.1, speed=3)"]}, ["speed"]),
        ({"settings": ["imaml.minimiser.speed=3"]}, ["(NewtonCG) has no field 'speed'", "solver"]),
        ({"settings": ["imaml.folds.speed=3"]}, ["imaml.folds is 5 and has no fields of its own"]),
        ({"settings": ["imaml.minimiser=open('x')"]}, ["must be one of", "got \"open('x')\""]),
        ({"settings": ["imaml.folds=Reset(3)"]}, ["must be a whole number or None, got Reset"]),
        ({"steps": 0}, ["--steps must be positive, got 0"]),
        ({"tolerance": -1.0}, ["--tolerance must be positive, got -1"]),
        ({"names": ["complete-pooling"], "steps": 5}, ["--steps fits none of complete-pooling"]),
        ({"names": ["joint", "joint"]}, ["'joint' is named twice"]),
        ({"names": []}, ["name at least one"]),
        ({"names": ["radom"]}, ["no strategy 'radom'; there are: imaml, maml"]),
        ({"config": "q = 1"}, ["'q' in", "stands in no table"]),
        ({"config": "[joint"}, ["is no TOML file"]),
        ({"config": "[tight]\nsteps = 3"}, ["no strategy 'tight'", "key strategy"]),
        ({"config": "[tight]\nstrategy = 'mine'"}, ["strategy = 'mine'; there are: imaml"]),
        ({"config": "[joint]\nstrategy = 'imaml'"}, ["give it a name of its own"]),
        ({"config": "[joint]\nq = 3"}, ["--config: joint.q", "must be one of 'delta'"]),
        ({"config": "[maml]\nsteps = 3"}, ["'maml' is not among", "--strategies"]),
    ],
)
def test_refusals_in_one_sentence(arguments: dict, pieces: list[str], tmp_path: Path) -> None:
    if "config" in arguments:
        (tmp_path / "mine.toml").write_text(arguments["config"])
        arguments = arguments | {"config": tmp_path / "mine.toml"}
    with pytest.raises(ValueError) as raised:
        choose(arguments.pop("names", ["joint", "imaml"]), **arguments)
    for piece in pieces:
        assert piece in str(raised.value), str(raised.value)
    assert "\n" not in str(raised.value).removesuffix("\n") or "TOML" in str(raised.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--config: no file"):
        choose(["joint"], config=tmp_path / "none.toml")
