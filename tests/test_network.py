"""Networks as they come: each layer and choice against the plain module, one task at a time."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import varmeta as vm
from varmeta import Density, GradientDescent, Tasks, fit
from varmeta.inference.energy import TaskEnergy
from varmeta.models import mask_classes, network, programs
from varmeta.models.layers import Dropout
from varmeta.seeds import generator

FLOAT = torch.float64
TASKS, ROWS, STEPS = 2, 3, 2


def normal(out: Tensor) -> Any:
    return dist.Normal(out[:, 0], 1.0)


class Over(nn.Module):
    """A layer over sequences of three features, averaged over time, to one number."""

    def __init__(self, core: nn.Module, width: int, call: Callable[..., Any]) -> None:
        super().__init__()
        self.core, self.last, self.call = core, nn.Linear(width, 1), call

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.call(self.core, x).mean(1))
        return out


def recurrent(kind: Any, width: int, **given: Any) -> nn.Module:
    return Over(kind(3, 4, batch_first=True, **given), width, lambda core, x: core(x)[0])


class Attention(nn.Module):
    def __init__(self, *, causal: bool = False, weights: bool = False, **given: Any) -> None:
        super().__init__()
        self.inside = nn.Linear(3, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True, **given)
        self.last, self.causal, self.weights = nn.Linear(4, 1), causal, weights

    def forward(self, x: Tensor) -> Tensor:
        h, size = self.inside(x), x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(size, dtype=x.dtype)
        how = {"attn_mask": mask, "is_causal": True} if self.causal else {}
        out: Tensor = self.attend(h, h, h, need_weights=self.weights, **how)[0]
        return self.last(out.mean(1))  # type: ignore[no-any-return]


def transformer(**given: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, **given)
    core = nn.Sequential(nn.Linear(3, 4), layer)
    return Over(core, 4, lambda core, x: core(x))


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * STEPS, 8), *layers, nn.Linear(8, 1))


def image(*layers: nn.Module) -> nn.Module:
    first = [nn.Unflatten(1, (1, STEPS)), nn.Conv2d(1, 2, 3, padding=1)]
    return nn.Sequential(*first, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 1))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "GRU, two layers, both ways": lambda: recurrent(nn.GRU, 8, num_layers=2, bidirectional=True),
    "GRU without biases": lambda: recurrent(nn.GRU, 4, bias=False),
    "LSTM": lambda: recurrent(nn.LSTM, 4),
    "LSTM, projected": lambda: recurrent(nn.LSTM, 2, proj_size=2),
    "RNN": lambda: recurrent(nn.RNN, 4, nonlinearity="relu"),
    "attention": Attention,
    "attention, causal": lambda: Attention(causal=True),
    "attention, more keys": lambda: Attention(weights=True, add_bias_kv=True, add_zero_attn=True),
    "transformer in eval mode": lambda: transformer().eval(),
    "transformer, norm first": lambda: transformer(norm_first=True, activation="gelu"),
    "group norm": lambda: flat(nn.GroupNorm(2, 8)),
    "batch norm, eval": lambda: flat(nn.BatchNorm1d(8)).eval(),
    "layer norm": lambda: flat(nn.LayerNorm(8), nn.GELU()),
    "in place": lambda: nn.Sequential(nn.ReLU(inplace=True), flat(nn.SiLU(inplace=True))),
    "images": lambda: image(nn.GroupNorm(1, 2), nn.ReLU(), nn.MaxPool2d(2)),
    "weight norm": lambda: flat(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh()),
}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().to(FLOAT)


def sequences() -> Tasks:
    x = torch.randn(TASKS, ROWS, STEPS, 3, generator=generator(0), dtype=FLOAT)
    return Tasks.from_list(list(zip(x, x[:, :, 0, 0].sin(), strict=True)))


def near(density: Density) -> Tensor:
    like = {"generator": generator(1), "dtype": density.prior_loc.dtype}
    return density.prior_loc + 0.3 * torch.randn(density.dim, **like)  # type: ignore[call-overload]


def each(density: Density, tasks: Tasks) -> Tensor:
    """Another θ for each task."""
    size = torch.linspace(1, 2, len(tasks), dtype=density.prior_loc.dtype)[:, None]
    return size * near(density)


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_is_the_plain_module_of_each_task(name: str) -> None:
    """Rows against the module itself; gradient and product against differences in float64."""
    module, tasks = built(LAYERS[name]), sequences()
    before, x = copy.deepcopy(module.state_dict()), tasks.inputs.clone()
    density = Density(network(module, normal), tasks)
    assert density._how == "together"
    theta = each(density, tasks)
    rows = density.log_likelihood(theta, tasks)
    for i in range(TASKS):
        plain = functional_call(module, density.constrain(theta[i]), (tasks.inputs[i].clone(),))
        wanted = normal(plain).log_prob(tasks.targets[i])
        torch.testing.assert_close(rows[i], wanted, rtol=1e-10, atol=1e-10)
    energy = TaskEnergy(density, tasks, density.shared_init)
    v = torch.randn(theta.shape, generator=generator(2), dtype=FLOAT)
    at, step = energy.linearise(theta), 1e-5
    ends = [energy.value_and_gradient(theta + s * v) for s in (step, -step)]
    slope = (ends[0][0] - ends[1][0]) / (2 * step)
    torch.testing.assert_close((at.grad * v).sum(-1).detach(), slope, rtol=1e-6, atol=1e-6)
    curve = (ends[0][1] - ends[1][1]) / (2 * step)
    torch.testing.assert_close(at.product(v), curve, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items())
    assert torch.equal(tasks.inputs, x)


@pytest.mark.parametrize("name", ["attention", "group norm"])
def test_layers_are_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first call, here; on the page of what works all layers are, and pullbacks."""
    monkeypatch.setattr(programs, "CALLS_BEFORE_CAPTURE", 1)
    tasks = sequences()
    density = Density(network(built(LAYERS[name]), normal), tasks)
    TaskEnergy(density, tasks, density.shared_init).linearise(each(density, tasks))
    assert density.execution() == {"likelihood: linearise": "recorded"}


def test_frozen_parameters_stay_frozen() -> None:
    """Fine-tuning the last layer: 9 latents, and the rest is what it was."""
    module = built(lambda: flat(nn.Tanh()))
    for parameter in module[1].parameters():
        parameter.requires_grad_(False)
    tasks = sequences()
    density = Density(network(module, normal), tasks)
    assert [s.name for s in density.sites] == ["3.weight", "3.bias"] and density.dim == 9
    theta = each(density, tasks)
    out = functional_call(module, density.constrain(theta[1]), (tasks.inputs[1],))
    wanted = normal(out).log_prob(tasks.targets[1])
    torch.testing.assert_close(density.log_likelihood(theta, tasks)[1], wanted)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("order", torch.tensor([2, 0, 1]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x[:, 0] * self.scale)))
        return out[:, self.order]


def test_tied_weights_are_one_latent_and_buffers_come_along() -> None:
    """The module in float32, the data in float64: it runs in float64."""
    module, tasks = Tied(), sequences()
    density = Density(network(module, normal), tasks)
    assert [s.name for s in density.sites] == ["first.weight", "first.bias", "second.bias"]
    theta = each(density, tasks)
    w, b, c = (density.constrain(theta[1])[s.name] for s in density.sites)
    x = tasks.inputs[1, :, 0] * torch.tensor([1.0, 2.0, 3.0], dtype=FLOAT)
    out = (torch.tanh(x @ w.T + b) @ w.T + c)[:, [2, 0, 1]]
    wanted = normal(out).log_prob(tasks.targets[1])
    torch.testing.assert_close(density.log_likelihood(theta, tasks)[1], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT, torch.bfloat16])
def test_integers_stay_integers_for_embeddings(dtype: torch.dtype) -> None:
    """The network's own data type is that of its latents, single precision where it is half."""
    module = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 1)).to(dtype)
    x = torch.randint(7, (TASKS, ROWS, 3), generator=generator(0))
    wide = FLOAT if dtype == FLOAT else torch.float32
    tasks = Tasks.from_list([(a, a.sum(1).to(wide)) for a in x])
    density = Density(network(module, normal), tasks)
    theta = each(density, tasks)
    assert theta.dtype == wide
    found = density.constrain(theta[0])
    out = found["0.weight"][x[0]].flatten(1) @ found["2.weight"].T + found["2.bias"]
    wanted = normal(out).log_prob(tasks.targets[0])
    torch.testing.assert_close(density.log_likelihood(theta, tasks)[0], wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", ["inputs", "targets"])
def test_half_precision_is_refused_in_words(dtype: torch.dtype, which: str) -> None:
    x, y = torch.zeros(4, STEPS, 3), torch.zeros(4)
    pair = (x.to(dtype), y) if which == "inputs" else (x, y.to(dtype))
    model = network(built(lambda: flat(nn.Tanh())).to(dtype), normal)
    with pytest.raises(ValueError, match=rf"{which} of {dtype}.*tasks.to\(dtype=torch.float32\)"):
        Density(model, Tasks.from_list([pair]))
    single = Tasks.from_list([(x, y)])  # the network in half precision runs in the data's type
    assert Density(model, single).prior_loc.dtype == torch.float32


# -- dropout --------------------------------------------------------------------------------------


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 1)).to(FLOAT)


def points(rows: int = 8) -> Tasks:
    x = torch.randn(4, rows, 3, generator=generator(3), dtype=FLOAT)
    return Tasks.from_list(list(zip(x, x.sum(-1), strict=True))).split(0.5)


def test_dropout_must_be_chosen() -> None:
    gru = recurrent(nn.GRU, 4, num_layers=2, dropout=0.1)
    for module in (dropping(), gru, nn.TransformerEncoderLayer(4, 2)):
        with pytest.raises(ValueError, match=r"dropout in training mode, in .*dropout='off'"):
            network(module, normal)
        network(module, normal, dropout="off")
        network(module.eval(), normal)
        with pytest.raises(ValueError, match=r"eval mode.*module.train\(\)"):
            network(module, normal, dropout="train")
    with pytest.raises(ValueError, match="did you mean 'off'"):
        network(dropping(), normal, dropout="of")  # type: ignore[arg-type]


def test_dropout_off_is_the_module_in_eval_mode() -> None:
    module, tasks = dropping(), points()
    off = Density(network(module, normal, dropout="off"), tasks)
    plain = Density(network(copy.deepcopy(module).eval(), normal), tasks)
    assert module.training
    theta = near(off).expand(4, -1)
    assert torch.equal(off.log_likelihood(theta, tasks), plain.log_likelihood(theta, tasks))


def test_masks_of_dropout_are_fair_and_independent() -> None:
    """2e5 values: shares and products within 5 standard errors (a false alarm in 1e6 each)."""
    size, p = 200_000, 0.3
    x = torch.ones(size // 4, 4, dtype=FLOAT)
    with Dropout(torch.tensor(12345)):
        first, second = nn.functional.dropout(x, p), nn.functional.dropout(x, p)
    with Dropout(torch.tensor(12346)):
        other = nn.functional.dropout(x, p)
        planes = nn.functional.dropout2d(torch.ones(500, 20, 2, 3), p)
        alpha = nn.functional.alpha_dropout(torch.randn(size, generator=generator(0)), p, True)
    assert set(first.unique().tolist()) == {0.0, 1 / (1 - p)}
    masks = [(t > 0).double().flatten() - (1 - p) for t in (first, second, other)]
    bound = 5 * (p * (1 - p) / size) ** 0.5
    assert all(abs(float(m.mean())) < bound for m in masks)
    pairs = [(0, 1), (0, 2), (1, 2)]
    products = [masks[a] * masks[b] for a, b in pairs] + [masks[0][1:] * masks[0][:-1]]
    assert all(abs(float(t.mean())) < 5 * p * (1 - p) / size**0.5 for t in products)
    assert torch.equal(planes.flatten(2).amin(-1), planes.flatten(2).amax(-1))
    assert abs(float(alpha.mean())) < 0.02 and abs(float(alpha.var()) - 1) < 0.02


def test_each_task_and_step_has_its_own_dropout_and_predictions_have_none() -> None:
    module, tasks = dropping(), points()
    density = Density(network(module, normal, dropout="train"), tasks)
    off = Density(network(module, normal, dropout="off"), tasks)
    theta = near(off).expand(4, -1)
    assert torch.equal(density.log_likelihood(theta, tasks), off.log_likelihood(theta, tasks))
    draws = [d.predict(theta, tasks, generator(0))["y"] for d in (density, off)]
    assert torch.equal(*draws)
    now, again, later = (density.in_step(generator(0, k)) for k in (1, 1, 2))
    rows = now.log_likelihood(theta, tasks)
    assert torch.equal(rows, again.log_likelihood(theta, tasks))
    assert not torch.equal(rows, later.log_likelihood(theta, tasks))
    one = tasks.select([2])
    torch.testing.assert_close(now.log_likelihood(theta[:1], one)[0], rows[2])
    keys = now.data(tasks)[2]
    assert len(set(keys.tolist())) == 4
    with Dropout(keys[2]):
        module_out = functional_call(module, off.constrain(theta[2]), (tasks.inputs[2],))
    torch.testing.assert_close(rows[2], normal(module_out).log_prob(tasks.targets[2]))
    support, query = now.data(tasks.support)[2], now.data(tasks.query)[2]
    assert not bool((support == query).any())


def test_recordings_are_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording made in one step gives what the next one's masks give, not its own."""
    monkeypatch.setattr(programs, "CALLS_BEFORE_CAPTURE", 1)
    tasks = points()
    density = Density(network(dropping(), normal, dropout="train"), tasks)
    theta = near(density).expand(4, -1)
    for k in range(2):
        step = density.in_step(generator(0, k))
        value, _ = TaskEnergy(step, tasks, density.shared_init).value_and_gradient(theta)
    assert density.execution() == {"likelihood: gradient": "recorded"}
    fresh = Density(network(density.model.module, normal, dropout="train"), tasks)  # type: ignore
    wanted = fresh.in_step(generator(0, 1)).negative_log_likelihood(theta, tasks)
    torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("kind", [vm.IMAML, vm.MAML])
def test_a_run_with_dropout_is_resumed_bit_for_bit(kind: Any, tmp_path: Any) -> None:
    tasks, module = points().select([0, 1]), built(dropping)
    strategy = kind(steps=2, learn_scale=False, minimiser=GradientDescent(0.01, 2, tolerance=0.0))

    def run(**given: Any) -> Any:
        density = Density(network(module, normal, dropout="train"), tasks)
        return fit(strategy, density, tasks, progress=False, **given).prior.loc

    def stop(step: int, info: Any) -> None:
        if step == 1:
            raise KeyboardInterrupt

    saved = tmp_path / "run.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # so few steps arrive nowhere
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=saved, on_step=stop)
        whole, other, resumed = run(), run(seed=1), run(checkpoint=saved)
    assert torch.equal(whole, resumed) and not torch.equal(whole, other)


def test_dropout_is_refused_where_the_likelihood_must_stay() -> None:
    density = Density(network(dropping(), normal, dropout="train"), points())
    with pytest.raises(ValueError, match=r"JointVariational needs .*dropout='off'.*IMAML"):
        fit(vm.JointVariational(), density, points())


# -- batch norm -----------------------------------------------------------------------------------


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).to(FLOAT)


def test_batch_norm_must_be_chosen() -> None:
    blind = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1, track_running_stats=False)).eval()
    for module in (normed(), blind):
        with pytest.raises(
            ValueError, match=r"batch norm .*batch_norm='task'.*batch_norm='frozen'"
        ):
            network(module, normal)
    with pytest.raises(ValueError, match="'frozen' needs running averages"):
        network(blind, normal, batch_norm="frozen")
    network(normed().eval(), normal)


@pytest.mark.parametrize("choice", ["frozen", "task"])
def test_batch_norm_is_that_of_each_task_or_of_the_running_averages(
    choice: Any, caplog: pytest.LogCaptureFixture
) -> None:
    module, tasks = normed(), points()
    module(torch.randn(50, 3, dtype=FLOAT) + 1)  # averages of some other data
    before = copy.deepcopy(module.state_dict())
    with caplog.at_level(logging.WARNING, "varmeta"):
        density = Density(network(module, normal, batch_norm=choice), tasks)
    assert density.joint == (choice == "task") == ("batch norm" in caplog.text)
    theta = near(density).expand(4, -1)
    for part in (tasks.support, tasks.query):
        loss = density.negative_log_likelihood(theta, part)
        for i in range(4):
            own = copy.deepcopy(module).train(choice == "task")
            out = functional_call(own, density.constrain(theta[i]), (part.inputs[i],))
            wanted = -normal(out).log_prob(part.targets[i]).sum()
            torch.testing.assert_close(loss[i], wanted)
    with pytest.warns(vm.NotConverged):
        result = fit(vm.MAML(steps=1, learn_scale=False), density, tasks, progress=False)
    assert bool(result.prior.loc.isfinite().all()) and module.training
    assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items())


# -- what is refused ------------------------------------------------------------------------------


def test_what_cannot_be_a_network_is_refused_in_words() -> None:
    frozen = nn.Linear(3, 1).requires_grad_(False)
    for module, said in ((frozen, "requires_grad=False"), (nn.Tanh(), "it has none")):
        with pytest.raises(ValueError, match=f"no parameter that could adapt.*{said}"):
            network(module, normal)
    with pytest.raises(ValueError, match="lazy layer whose weight has no shape"):
        network(nn.LazyLinear(1), normal)
    with pytest.raises(TypeError, match="module must be a Module"):
        network(lambda x: x, normal)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prior_scale must be positive"):
        network(nn.Linear(3, 1), normal, prior_scale=0.0)


# -- classes --------------------------------------------------------------------------------------


class Ways(nn.Module):
    """A linear classifier; a task's number of classes is the first column of x."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return mask_classes(self.net(x[:, 1:]), x[:, 0])


def ways(labels: tuple[int, ...] = (2, 4)) -> Tasks:
    x = torch.randn(2, 12, 2, generator=generator(4), dtype=FLOAT)
    counts = torch.tensor([2.0, 4.0], dtype=FLOAT)[:, None, None].expand(2, 12, 1)
    y = [torch.arange(12) % k for k in labels]
    return Tasks.from_list(list(zip(torch.cat([counts, x], -1), y, strict=True)))


def categorical(out: Tensor) -> Any:
    return dist.Categorical(logits=out)


def test_tasks_have_classes_of_their_own_number() -> None:
    """Rows, gradient and products are those of a softmax over the task's own classes."""
    tasks = ways()
    density = Density(network(Ways(), categorical), tasks)
    theta = each(density, tasks)
    v = torch.randn(theta.shape, generator=generator(5), dtype=FLOAT)

    def own(flat: Tensor, i: int) -> Tensor:
        found = density.constrain(flat)
        logits = tasks.inputs[i, :, 1:] @ found["net.weight"].T + found["net.bias"]
        logits = logits[:, : (2, 4)[i]]
        return nn.functional.cross_entropy(logits, tasks.targets[i], reduction="sum")

    energy = TaskEnergy(density, tasks, density.shared_init)
    products = [energy.linearise(theta, gauss_newton=gn).product(v) for gn in (False, True)]
    for i in range(2):
        torch.testing.assert_close(energy(theta)[i], own(theta[i], i))
        hessian = torch.autograd.functional.hessian(lambda flat, i=i: own(flat, i), theta[i])
        for product in products:  # of a linear model and its own link they are the same
            torch.testing.assert_close(product[i], hessian @ v[i])
    drawn = density.predict(theta.expand(200, -1, -1), tasks, generator(0))["y"]
    assert drawn[:, 0].max() == 1 and drawn[:, 1].max() == 3


@pytest.mark.parametrize(
    ("labels", "said"),
    [((2, 5), "task '1', row 4 .*gets 4.*from 0 to 3"), ((3, 4), "loss of task '0 .*is inf")],
    ids=["of no output", "of a hidden one"],
)
def test_a_label_that_a_task_has_no_class_for_is_refused(labels: Any, said: str) -> None:
    with pytest.raises((ValueError, vm.NonFiniteLoss), match=said):
        density = Density(network(Ways(), categorical), ways(labels))
        fit(vm.MAML(steps=1, learn_scale=False), density, ways(labels), progress=False)
