"""No run goes on from the state of another one, and every run goes on from its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fingerprint_cases as cases
import pyro
import pyro.distributions as dist
import pytest
import torch
from catalogue import CATALOGUE
from fingerprint_cases import JOINT, around, data, of
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import Tensor

from varmeta import (
    CompletePooling,
    Density,
    GaussianPrior,
    Modules,
    PyroSVI,
    Tasks,
    TaskSource,
    compare,
    fit,
)
from varmeta import fingerprint as fingerprint_module
from varmeta.cli import load_model
from varmeta.digest import digest, digests_of
from varmeta.fingerprint import differences, in_words
from varmeta.inference.base import StepInfo
from varmeta.models import sinusoids

F64 = torch.float64
TASKS = data()
DENSITY = Density(around(0.5), TASKS)


def stop(step: int, info: StepInfo) -> None:
    if step == 2:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the same run: one stopped after two of four steps, one finished."""
    folder = tmp_path_factory.mktemp("halves")
    with pytest.raises(KeyboardInterrupt):
        fit(JOINT, DENSITY, TASKS, checkpoint=folder / "half.pt", on_step=stop)
    fit(JOINT, DENSITY, TASKS, checkpoint=folder / "whole.pt")
    return folder


def prior(**options: Any) -> GaussianPrior:
    return GaussianPrior.from_density(DENSITY, **options)


def heavy(x: Tensor, y: Tensor | None = None) -> Tensor:
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.StudentT(3.0, theta * x[..., 0], 0.5), obs=y)


def moved(name: str, amount: float, where: int | None = None) -> Tasks:
    values = getattr(TASKS, name).clone()
    values[... if where is None else where] += amount
    return replace(TASKS, **{name: values})


# What is changed, and the only topics that a refusal may name.
STALE: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "data + 100": (lambda: {"tasks": moved("targets", 100.0)}, "the targets"),
    "one target": (lambda: {"tasks": moved("targets", 1e-9, 2)}, "the targets"),
    "inputs": (lambda: {"tasks": moved("inputs", 0.5)}, "the inputs"),
    "order": (lambda: {"tasks": TASKS.select([2, 1, 0])}, "the order of the tasks"),
    "names": (
        lambda: {"tasks": replace(TASKS, names=("beta", "alpha", "gamut"))},
        "the names of the tasks",
    ),
    "columns": (
        lambda: {"tasks": replace(TASKS, input_names=("weight",))},
        "the names of inputs and target (dose, target, now weight, target)",
    ),
    "split": (lambda: {"tasks": TASKS.split(0.3, seed=5)}, "the split"),
    "no split": (lambda: {"tasks": TASKS.unsplit}, "the split (4 query rows, now none)"),
    "prior": (
        lambda: {"prior": replace(prior(), log_scale=prior().log_scale + 1)},
        "the prior's scales",
    ),
    "start": (lambda: {"prior": replace(prior(), loc=prior().loc + 0.01)}, "the prior's location"),
    "bounds": (lambda: {"prior": prior(bounds=(0.01, 10.0))}, "the prior's bounds"),
    "low rank": (lambda: {"prior": prior(rank=1)}, "the prior's low-rank part"),
    "hyperprior": (
        lambda: {"prior": prior(scale_law="half-cauchy")},
        "the hyperprior (half-normal scales, now half-cauchy scales)",
    ),
    "no hyperprior": (
        lambda: {"prior": prior(hyperprior=False)},
        "the hyperprior (half-normal scales, now none)",
    ),
    "modules": (
        lambda: {"prior": prior(scales=Modules(("other",), torch.zeros(1, dtype=torch.long)))},
        "the prior's modules",
    ),
    "likelihood": (lambda: {"density": Density(heavy, TASKS)}, "the model's code"),
    "its constant": (lambda: {"density": Density(around(0.6), TASKS)}, "the model's noise"),
    "user's prior": (
        lambda: {"density": Density(around(0.5, prior=20.0), TASKS), "prior": prior()},
        "the model's prior, the latent 'theta' (Normal(0, 2) on Real, shape (), now Normal(0, 20) "
        "on Real, shape ())",
    ),
    "renamed site": (
        lambda: {"density": Density(around(0.5, site="psi"), TASKS)},
        "the model's site, the latent 'psi' (new), the prior's modules, the latent 'theta' (gone)",
    ),
    "batch size": (lambda: {"batch_size": 2}, "batch_size (None, now 2)"),
    "seed": (lambda: {"seed": 1}, "seed (0, now 1)"),
    "setting": (
        lambda: {"strategy": replace(JOINT, adapt_steps=3)},
        "the strategy (adapt_steps=2, now adapt_steps=3)",
    ),
}


def asked(change: dict[str, Any], path: Path) -> Any:
    given = {"strategy": JOINT, "density": DENSITY, "tasks": TASKS, **change}
    return fit(**given, checkpoint=path)


@pytest.mark.parametrize("state", ["half.pt", "whole.pt"])
@pytest.mark.parametrize("name", STALE)
def test_a_stale_checkpoint_is_refused(name: str, state: str, halves: Path, tmp_path: Path) -> None:
    """With the topic that differs and no other; neither a step is run nor the file touched."""
    path = tmp_path / "run.pt"
    shutil.copy(halves / state, path)
    before = path.read_bytes()
    change, wanted = STALE[name]
    with pytest.raises(ValueError, match="is of another run; it differs in ") as caught:
        asked(change(), path)
    found = str(caught.value).split("it differs in ")[1].split(". Give the same arguments")[0]
    assert found == wanted
    assert path.read_bytes() == before


def test_float32_data_are_other_data(halves: Path) -> None:
    single = TASKS.to(torch.float32)
    with pytest.raises(ValueError, match=r"the inputs \(float64, now float32\), the targets \(fl"):
        asked({"tasks": single, "density": Density(around(0.5), single)}, halves / "half.pt")


@pytest.fixture
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_by_default")
def test_so_is_another_default_dtype(halves: Path) -> None:
    with pytest.raises(ValueError, match=r"default dtype \(float32, now float64\)\."):
        asked({}, halves / "half.pt")


def test_streams_are_told_apart() -> None:
    """By seed, settings, code, and what they draw."""
    batch = {"files": TASKS}

    def read(rng: torch.Generator) -> Tasks:
        return batch["files"]

    def doubled(rng: torch.Generator) -> Tasks:
        return batch["files"].to(None)

    source = TaskSource(sinusoids(num_tasks=3, support=2, query=2))
    first = of(DENSITY, source)
    assert (
        differences(first, of(DENSITY, TaskSource(sinusoids(num_tasks=3, support=2, query=2))))
        == {}
    )
    assert (
        "the stream's seed (0, now 1)"
        in differences(
            first, of(DENSITY, TaskSource(sinusoids(num_tasks=3, support=2, query=2), seed=1))
        ).values()
    )
    assert set(
        differences(first, of(DENSITY, TaskSource(sinusoids(num_tasks=3, support=2, query=3))))
    ) == {
        "the stream's query",
        "the stream's first batches",
    }
    stored = TaskSource(read)
    before = of(DENSITY, stored)
    assert set(differences(before, of(DENSITY, TaskSource(doubled)))) == {"the stream's code"}
    batch["files"] = moved("targets", 1.0)
    assert set(differences(before, of(DENSITY, stored))) == {"the stream's first batches"}
    assert "the names of the tasks (gone)" in differences(of(DENSITY, TASKS), before).values()


@pytest.mark.parametrize(
    ("name", "value", "topic"),
    [
        ("SCALE", 3.0, "the model's mean_of"),
        ("mean_of", lambda theta, x: theta + x[..., 0], "the model's mean_of"),
        ("OPTIONS", {"tails": {"light"}, "laws": [dist.Normal]}, "the model's OPTIONS"),
    ],
)
def test_what_a_model_reads_counts(
    name: str, value: Any, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Globals, and those of the functions that it calls."""
    before = of(Density(cases.line, TASKS))
    monkeypatch.setattr(cases, name, value)
    assert set(differences(before, of(Density(cases.line, TASKS)))) == {topic}


def test_weights_of_a_network_count() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(1, 1).double()
    model = cases.network(net, lambda out: dist.Normal(out[:, 0], 0.3))
    before = of(Density(model, TASKS))
    with torch.no_grad():
        net.bias += 1
    found = set(differences(before, of(Density(model, TASKS))))
    assert {"the model's module", "the latent 'bias'", "the prior's location"} <= found


def test_guides_with_one_repr_are_told_apart(tmp_path: Path) -> None:
    """Also two on one line; the same guide written twice is the same."""
    narrow, wide = (
        (lambda m: AutoNormal(m, init_scale=0.1)),
        (lambda m: AutoNormal(m, init_scale=1.0)),
    )
    again = lambda model: AutoNormal(model, init_scale=0.1)  # noqa: E731
    svi = {name: PyroSVI(guide, steps=3, draws=10) for name, guide in vars_of(narrow, wide, again)}
    assert repr(svi["0"]) == repr(svi["1"])
    path = tmp_path / "run.pt"
    fit(svi["0"], DENSITY, TASKS, checkpoint=path)
    fit(svi["2"], DENSITY, TASKS, checkpoint=path)
    with pytest.raises(ValueError, match=r"differs in the strategy\. Give"):
        fit(svi["1"], DENSITY, TASKS, checkpoint=path)
    of_classes = [of(DENSITY, strategy=PyroSVI(g)) for g in (AutoNormal, AutoDiagonalNormal)]
    assert set(differences(*of_classes)) == {"the strategy"}


def vars_of(*things: Any) -> list[tuple[str, Any]]:
    return [(str(k), thing) for k, thing in enumerate(things)]


def test_a_guide_whose_code_cannot_be_seen_is_refused(tmp_path: Path) -> None:
    class Sealed:
        """As a compiled function of the user's: neither code nor content to be had."""

        __slots__ = ()

        def __call__(self, model: Any) -> Any:
            return AutoNormal(model)

        def __reduce_ex__(self, protocol: Any) -> Any:
            raise TypeError("cannot pickle")

    strategy = PyroSVI(Sealed(), steps=2, draws=10)
    with pytest.raises(ValueError, match=r"the code of .*Sealed cannot be seen.*leave checkpoint"):
        fit(strategy, DENSITY, TASKS, checkpoint=tmp_path / "run.pt")


MODEL = """
import pyro
import pyro.distributions as dist

WIDTH = 0.5

def model(x, y=None):
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", x.shape[-2]):
        return pyro.sample("y", dist.Normal(theta * x[..., 0], WIDTH), obs=y)
"""


@pytest.mark.parametrize(
    ("old", "new", "topic"),
    [
        ("import pyro\n", "# A note, and lines further down.\n\nimport pyro\n", None),
        ("theta", "slope", "the model's code"),
        ("Normal(theta", "Laplace(theta", "the model's code"),
        ("WIDTH = 0.5", "WIDTH = 0.7", "the model's WIDTH"),
    ],
)
def test_a_model_file_edited_in_place(
    old: str, new: str, topic: str | None, tmp_path: Path
) -> None:
    """Comments and places do not matter; what the model does, and the numbers that it reads, do."""
    file, path = tmp_path / "mine.py", tmp_path / "run.pt"
    file.write_text(MODEL)
    fit(JOINT, Density(load_model(file, "model"), TASKS), TASKS, checkpoint=path)
    file.write_text(MODEL.replace(old, new))
    edited = Density(load_model(file, "model"), TASKS)
    if topic is None:
        assert fit(JOINT, edited, TASKS, checkpoint=path).finished
        return
    with pytest.raises(ValueError, match=f"is of another run; it differs in .*{topic}"):
        fit(JOINT, edited, TASKS, checkpoint=path)


def test_a_csv_corrected_between_two_comparisons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varmeta.comparison._write", lambda *_: None)  # so it is never finished
    file, folder = tmp_path / "data.csv", tmp_path / "run"
    rows = ["task,x,y", *(f"t{t},{n},{t + n / 2}" for t in range(3) for n in range(4))]

    def run() -> Any:
        file.write_text("\n".join(rows))
        tasks = Tasks.from_csv(file, task="task", inputs=["x"], target="y").split(0.3)
        pooled = [CompletePooling(draws=10)]
        return compare(pooled, Density(around(0.5), tasks), tasks, draws=10, folder=folder)

    assert run().table.equals(run().table)
    rows[6] = "t1,1,1.6"
    with pytest.raises(FileExistsError, match=r"other settings: it differs in train: the targets;"):
        run()


def test_a_message_names_the_first_few() -> None:
    there, here = ({f"topic {k}": str(k + n) for k in range(20)} for n in (0, 1))
    words = in_words(differences(there, here))
    assert words.startswith("topic 0 (0, now 1), topic 1 (1, now 2)")
    assert words.endswith("topic 7 (7, now 8) and 12 more")


# -- versions, and files that say nothing ----------------------------------------------------------


@pytest.mark.parametrize(("name", "read"), [("torch", True), ("pyro", True), ("varmeta", False)])
def test_versions(
    name: str, read: bool, halves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on under the same ones alone; a finished one may be read under others."""
    other = fingerprint_module._VERSIONS | {name: "0.0.1"}
    monkeypatch.setattr(fingerprint_module, "_VERSIONS", other)
    with pytest.raises(ValueError, match=rf"differs in {name} \(.*, now 0\.0\.1\)"):
        asked({}, halves / "half.pt")
    if read:
        with pytest.warns(RuntimeWarning, match=rf"finished run under other versions: {name} \("):
            assert asked({}, Path(shutil.copy(halves / "whole.pt", tmp_path))).finished
    else:
        with pytest.raises(ValueError, match="differs in varmeta"):
            asked({}, halves / "whole.pt")


def test_a_checkpoint_that_does_not_say_what_it_is(halves: Path, tmp_path: Path) -> None:
    saved = torch.load(halves / "half.pt", weights_only=True)
    del saved["fingerprint"]
    torch.save(saved, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"does not say what it belongs to.*name another file"):
        asked({}, tmp_path / "old.pt")


def test_an_unfinished_run_of_an_earlier_version(tmp_path: Path) -> None:
    old = {"strategies": {"pooled": "CompletePooling()"}, "tasks": "Tasks(...)", "seed": 0}
    run = {"finished": False, "settings": old, "files": []}
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(FileExistsError, match="an earlier version of varmeta wrote it"):
        compare([CompletePooling(draws=10)], DENSITY, TASKS, draws=10, folder=tmp_path)


def test_a_saved_fit_can_be_taken_up(tmp_path: Path) -> None:
    done = fit(JOINT, DENSITY, TASKS)
    done.save(tmp_path / "saved.pt")
    again = asked({}, tmp_path / "saved.pt")
    assert torch.equal(again.prior.loc, done.prior.loc)


# -- no run is refused that is the same ------------------------------------------------------------


def test_another_process_finds_the_same(tmp_path: Path) -> None:
    """Whatever its addresses and the order of its sets: every model, strategy and stream.

    The new process also takes the checkpoint up that this one has stopped.
    """
    path, density = tmp_path / "run.pt", Density(cases.noisy, TASKS, shared=["noise"])
    whole = fit(JOINT, density, TASKS)
    with pytest.raises(KeyboardInterrupt):
        fit(JOINT, density, TASKS, checkpoint=path, on_step=stop)
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    ran = subprocess.run(
        [sys.executable, cases.__file__, path],
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    there = json.loads(ran.stdout)
    assert there["history"] == whole.history["loss"].tolist()
    here = cases.everything()
    assert there["found"].keys() == here.keys()
    for name, found in here.items():
        assert there["found"][name] == found, name


def test_strategies_of_the_catalogue_are_told_apart() -> None:
    found = {
        name: of(DENSITY, strategy=e.strategy)["the strategy"] for name, e in CATALOGUE.items()
    }
    assert len(set(found.values())) == len(CATALOGUE)


@pytest.mark.parametrize("make", cases.DENSITIES.values(), ids=cases.DENSITIES)
def test_running_a_model_leaves_its_fingerprint(make: Any) -> None:
    """Also where it counts its calls, or PyTorch keeps what it has computed."""
    density, tasks = make()
    before = of(density, tasks)
    fit(JOINT, density, tasks).adapt(tasks.support)
    assert differences(before, of(density, tasks)) == {}


LAWS = [
    dist.Normal(0.0, 1.0),
    dist.LogNormal(0.0, 1.0),
    dist.HalfCauchy(1.0),
    dist.Beta(1.0, 2.0),
    dist.Gamma(2.0, 1.0),
    dist.InverseGamma(2.0, 1.0),
    dist.StudentT(3.0, 0.0, 1.0),
    dist.Uniform(0.0, 1.0),
    dist.Dirichlet(torch.ones(3)),
    dist.LKJCholesky(3, torch.tensor(1.0)),
    dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    dist.LowRankMultivariateNormal(torch.zeros(2), torch.ones(2, 1), torch.ones(2)),
    dist.Laplace(0.0, 1.0).expand([3]).to_event(1),
    dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.SigmoidTransform()]),
    dist.Bernoulli(0.3),
    dist.Categorical(logits=torch.zeros(3)),
    dist.Geometric(torch.tensor(0.3)),
    dist.NegativeBinomial(3, logits=torch.tensor(0.0)),
    dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0)),
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_using_a_law_leaves_its_digest(law: Any) -> None:
    before = digest(law)
    law.log_prob(law.sample())
    for name in ("probs", "logits", "covariance_matrix", "precision_matrix", "scale_tril"):
        getattr(law, name, None)
    with_transform = not law.support.is_discrete and not isinstance(law, dist.MixtureSameFamily)
    if with_transform:
        torch.distributions.biject_to(law.support).inv(law.sample())
    assert digest(law) == before
    assert len({digest(other) for other in LAWS}) == len(LAWS)


def test_digests_of_containers_and_objects() -> None:
    """Equal ones are alike in whatever order, unequal ones are not; cycles come to an end."""
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})
    assert digest([1, 2]) != digest([2, 1]) and digest([1]) != digest((1,)) != digest(1)
    assert digest(1) != digest(1.0) != digest(True) and digest("1") != digest(1)
    assert (
        digest(torch.zeros(2)) != digest(torch.zeros(2, 1)) != digest(torch.zeros(2, 1, dtype=F64))
    )
    assert digest(torch.zeros(0)) != digest(torch.zeros(1).expand(3)) == digest(torch.zeros(3))
    assert digest(data().inputs.numpy()) == digest(data().inputs.numpy())
    ring: list[Any] = [1]
    ring.append({"ring": ring})
    assert digest(ring) == digest([1, ring[1]])[:0] + digest(ring)
    assert digest(lambda: 1) == digest(lambda: 1) != digest(lambda: 2)
    calls: list[int] = []
    read = digests_of(lambda: calls, contents=False)
    calls.append(1)
    assert digests_of(lambda: calls, contents=False) == read != digests_of(lambda: calls)


def test_no_random_numbers_and_nothing_of_pyros() -> None:
    pyro.get_param_store().clear()
    pyro.param("mine", torch.tensor(3.0))
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cases.of(DENSITY, TaskSource(sinusoids(num_tasks=3, support=2, query=2)))
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store()) == ["mine"]
    pyro.get_param_store().clear()


def test_it_costs_little_with_many_tasks() -> None:
    """Below 0.1 s for 20,000 tasks of 5 rows (40 ms measured)."""
    shape = (20_000, 5)
    tasks = Tasks(
        torch.randn(*shape, 2, dtype=F64),
        torch.randn(shape, dtype=F64),
        torch.ones(shape, dtype=torch.bool),
        torch.zeros(shape, dtype=torch.bool),
        tuple(f"county {i}" for i in range(shape[0])),
    )
    times = []
    for _ in range(3):
        start = time.process_time()
        of(DENSITY, tasks)
        times.append(time.process_time() - start)
    assert min(times) < 0.1, times
