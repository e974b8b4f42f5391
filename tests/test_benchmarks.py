"""The benchmarks compare like with like: every implementation computes the same meta-gradient."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import bad_inputs, envelope, figure2, joint_against_svi, joint_scale
from benchmarks.check import check
from benchmarks.peers import PEERS
from benchmarks.reference import relative_error, solve
from benchmarks.workloads import NAMES, Workload, make, nll, pyro_model
from varmeta import JointVariational, PyroSVI

# Other packages' deprecations are theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


def tiny(name: str) -> Workload:
    """Two tasks, three steps; few enough for every implementation to compile."""
    workload = make(name, 2, dim=6, rows=5)
    return replace(workload, inner_steps=3, cg_steps=2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("implementation", PEERS)
def test_every_implementation_has_the_reference_meta_gradient(implementation, name):
    peer = PEERS[implementation]
    if why := peer.why_absent():
        pytest.skip(why)
    if (implementation, name) == ("jax", "omniglot"):
        pytest.skip("XLA takes 20 s for it; the benchmark checks it before it is timed")
    if implementation == "varmeta compiled":
        pytest.skip("compiling takes minutes; the benchmark checks it before it is timed")
    workload = tiny(name)
    found = check(peer, peer.build(workload), workload, solve(workload), seconds=60)
    if peer.check == "inexact":  # it differentiates three steps, not the minimum
        assert found.passed is None and found.loss < 1e-5
    else:
        assert found.passed, found
        assert found.tasks == 2


def test_the_reference_is_the_closed_form_of_a_linear_model():
    workload = tiny("linear")
    got = solve(workload).gradients
    lam = workload.precision
    for i in range(workload.tasks):
        x, xq = workload.x[i].astype(float), workload.x_query[i].astype(float)
        y, yq = workload.y[i].astype(float), workload.y_query[i].astype(float)
        a = x.T @ x + lam * np.eye(workload.dim)
        theta = workload.theta0.astype(float)
        for _ in range(workload.inner_steps):
            theta = theta - workload.step_size * (
                x.T @ (x @ theta - y) + lam * (theta - workload.theta0)
            )
        b = xq.T @ (xq @ theta - yq)
        # k steps of CG from 0 minimise the energy norm of the error over span{b, Ab, …, Aᵏ⁻¹b}
        basis = np.stack([b, a @ b], axis=1)
        solution = basis @ np.linalg.solve(basis.T @ a @ basis, basis.T @ b)
        assert relative_error(got[i], lam * solution) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_pyro_model_and_plain_function_are_one_model(name):
    from benchmarks.peers.varmeta_eager import tasks_of
    from varmeta import Density

    workload = tiny(name)
    model, shared, phi = pyro_model(workload)
    tasks = tasks_of(workload)
    density = Density(model, tasks, shared=shared)
    theta = torch.as_tensor(workload.theta0) + 0.01
    got = density.negative_log_likelihood(theta.expand(2, -1), tasks.support, phi)
    rows = workload.tensors().support
    want = torch.stack([nll(name)(theta, *(t[i] for t in rows)) for i in range(2)])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)  # float32, sums of ≤ 100 rows


def test_a_workload_survives_its_file(tmp_path):
    workload = tiny("radon")
    workload.save(tmp_path / "w.npz")
    again = Workload.load(tmp_path / "w.npz")
    assert again.name == "radon" and again.inner_steps == 3
    assert np.array_equal(again.x_query, workload.x_query)


def test_both_methods_of_figure_2_have_the_exact_gradient_in_the_limit():
    problem = figure2.Problem.make(tasks=2, rows=8, dim=3)
    exact = problem.exact()
    steps = int(40 * problem.spectrum()[1] / problem.spectrum()[0])  # e^-40 of the start is left
    for method in (figure2.Implicit(problem, 3), figure2.Unrolled(problem)):  # D = 3: CG is exact
        gradient, _ = method(steps)
        torch.testing.assert_close(gradient, exact, rtol=1e-8, atol=1e-10)


def test_unrolling_holds_memory_per_step_and_the_implicit_gradient_does_not():
    problem = figure2.Problem.make(tasks=2, rows=8, dim=3)
    implicit = [figure2.bytes_held("implicit CG 2", problem, k) for k in (2, 20)]
    unrolled = [figure2.bytes_held("unrolled", problem, k) for k in (2, 20)]
    assert implicit[0] == implicit[1]
    assert unrolled[1] > 2 * unrolled[0]


def test_what_the_envelope_theorem_saves_is_timed_for_every_step(monkeypatch):
    monkeypatch.setattr(envelope, "WARM", 1)
    workload = envelope.radon()
    few = replace(workload, tasks=workload.tasks.select([0, 1]))
    assert envelope.table(few, rounds=1).row_count == 6


def test_the_table_of_a_joint_run_is_as_large_as_predicted(monkeypatch):
    monkeypatch.setattr(joint_scale, "WARM", 2)
    monkeypatch.setattr(joint_scale, "STEPS", 3)
    run = joint_scale.Steps(150)
    for _ in range(5):
        run.step()
    held, predicted = run.megabytes
    assert held == predicted and run.microseconds > 0


def test_joint_and_pyros_svi_lower_the_same_bound(monkeypatch):
    monkeypatch.setattr(joint_against_svi, "WARM_UP", 1)
    density, tasks = joint_against_svi.synthetic(20)
    assert joint_against_svi.table("", density, tasks, steps=20).row_count == 3
    options = {"learning_rate": joint_against_svi.LEARNING_RATE, "steps": 60}
    for strategy in (
        JointVariational(q="diagonal", **options),
        PyroSVI(samples=8, point_globals=True, centred=True, **options),
    ):
        bounds = joint_against_svi.run(strategy, density, tasks, 60).bounds
        assert bounds[-1] < bounds[0] - 0.5


def test_every_kind_of_bad_input_gets_an_error_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    table = bad_inputs.main()
    assert table.loc["all", "ours"] > 150
    assert table.loc["all", ["vague", "raw", "silent"]].tolist() == [0, 0, 0]
