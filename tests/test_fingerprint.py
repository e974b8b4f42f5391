"""No run goes on from the state of another one, and every run goes on from its own."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import fingerprint_cases as cases
import pyro
import pyro.distributions as dist
import pytest
import torch
from catalogue import CATALOGUE
from fingerprint_cases import of
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

from benchmarks import stale
from benchmarks.stale import DENSITY, JOINT, STALE, TASKS
from benchmarks.stale_models import DENSITIES, around, data
from varmeta import (
    CompletePooling,
    Density,
    PyroSVI,
    Tasks,
    TaskSource,
    compare,
    fit,
)
from varmeta.digest import digest, digests_of
from varmeta.fingerprint import differences, in_words
from varmeta.model_files import load_model
from varmeta.models import network, sinusoids

F64 = torch.float64


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> stale.Shelf:
    return stale.Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after two of four steps."""
    folder = tmp_path_factory.mktemp("halves")
    stale.keep(stale.UNFINISHED, folder / "half.pt", stale.given())
    return folder


def asked(change: dict[str, Any], path: Path) -> Any:
    return fit(**stale.given(**change), checkpoint=path)


@pytest.mark.parametrize("what", stale.KEPT)
@pytest.mark.parametrize("name", STALE)
def test_what_is_stale_is_refused(name: str, what: str, shelf: stale.Shelf, tmp_path: Path) -> None:
    """With the topic that differs and no other; neither a step is run nor a file touched.

    A finished run under other versions of PyTorch or Pyro may be read, with a warning.
    """
    kind = STALE[name]
    if what not in kind.kept:
        pytest.skip("has no such argument")
    found, said = stale.outcome(kind, what, shelf.copy(kind, what, tmp_path / "run.pt"))
    assert found == stale.wanted(kind, what), said


@pytest.mark.parametrize("what", stale.KEPT)
def test_what_is_not_stale_is_taken_up(
    what: str, shelf: stale.Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the outcomes above could be others."""
    monkeypatch.setattr("varmeta.comparison._write", lambda *_: None)
    same = stale.Kind(dict, "")
    path = shelf.copy(same, what, tmp_path / "run.pt")
    assert stale.outcome(same, what, path) == ("taken up", "")


def test_what_a_stream_draws_counts() -> None:
    """Also where its code, and what that reads, are the same objects."""
    batch = {"files": TASKS}
    stored = TaskSource(lambda rng: batch["files"])
    before = of(DENSITY, stored)
    assert differences(before, of(DENSITY, stored)) == {}
    batch["files"] = stale.moved("targets", 1.0)
    assert set(differences(before, of(DENSITY, stored))) == {"the stream's first batches"}
    assert "the names of the tasks (gone)" in differences(of(DENSITY, TASKS), before).values()


def test_weights_of_a_network_count() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(1, 1).double()

    def model() -> Any:
        return network(net, law)

    law: Any = lambda out: dist.Normal(out[:, 0], 0.3)  # noqa: E731
    early, before = model(), of(Density(model(), TASKS))
    with torch.no_grad():
        net.bias += 1
    assert differences(before, of(Density(early, TASKS))) == {}  # as it was when it was given
    found = set(differences(before, of(Density(model(), TASKS))))
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


# -- files that say nothing ------------------------------------------------------------------------


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

    The new process also takes a checkpoint up that this one has stopped.
    """
    found = stale.again(tmp_path, [sys.executable, cases.__file__], "model: shared law")
    assert found == {"model: shared law": "goes on"}
    there = json.loads((tmp_path / "everything.json").read_text())
    here = cases.everything()
    assert there.keys() == here.keys()
    for name, found in here.items():
        assert there[name] == found, name


def test_strategies_of_the_catalogue_are_told_apart() -> None:
    found = {
        name: of(DENSITY, strategy=e.strategy)["the strategy"] for name, e in CATALOGUE.items()
    }
    assert len(set(found.values())) == len(CATALOGUE)


@pytest.mark.parametrize("make", DENSITIES.values(), ids=DENSITIES)
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
        of(DENSITY, TaskSource(sinusoids(num_tasks=3, support=2, query=2)))
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
