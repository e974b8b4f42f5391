"""The command line: `varmeta compare radon`, or with your own model and data; `varmeta figures`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from varmeta import __version__
from varmeta.comparison import compare as run_comparison
from varmeta.inference.abml import ABML
from varmeta.inference.amortised import AmortisedVariational, LaplaceEvidence
from varmeta.inference.base import Strategy
from varmeta.inference.estimators import Score
from varmeta.inference.imaml import IMAML
from varmeta.inference.joint import JointVariational
from varmeta.inference.maml import FOMAML, MAML, MetaSGD, Reptile
from varmeta.inference.nuts import PyroNUTS
from varmeta.inference.pooling import CompletePooling, NoPooling
from varmeta.inference.resets import Reset
from varmeta.inference.sigma import SigmaIMAML, SigmaMAML, SigmaReptile
from varmeta.inference.stochastic import Stochastic
from varmeta.inference.svi import PyroSVI
from varmeta.models.sites import Model
from varmeta.problems import PROBLEMS, Problem
from varmeta.tasks import Tasks

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "imaml": IMAML,
    "maml": MAML,
    "fomaml": FOMAML,
    "meta-sgd": MetaSGD,
    "reptile": Reptile,
    "sigma-imaml": SigmaIMAML,
    "sigma-maml": SigmaMAML,
    "sigma-reptile": SigmaReptile,
    "amortised": AmortisedVariational,
    "laplace-evidence": LaplaceEvidence,
    "abml": ABML,
    "joint": JointVariational,
    "joint-reset": lambda: JointVariational(resets=Reset(250)),
    "joint-delta": lambda: JointVariational(q="delta"),
    "joint-full": lambda: JointVariational(q="full"),
    "stochastic": Stochastic,
    "stochastic-score": lambda: Stochastic(estimator=Score(), particles=8),
    "nuts": PyroNUTS,
    "svi": PyroSVI,
    "no-pooling": NoPooling,
    "complete-pooling": CompletePooling,
}
_DEFAULT = "imaml,joint,stochastic,nuts,no-pooling,complete-pooling"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Bayesian and variational meta-learning of Pyro models.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"varmeta {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Bayesian and variational meta-learning of Pyro models."""
    if "OMP_NUM_THREADS" not in os.environ:
        # Batches of small matrices: a second thread costs more than it brings, on a busy machine
        # ten times more.
        torch.set_num_threads(1)


@app.command()
def compare(
    problem: Annotated[
        str,
        typer.Argument(
            help=f"A shipped problem ({', '.join(PROBLEMS)}) or your model, my_model.py:function."
        ),
    ],
    data: Annotated[Path | None, typer.Option(help="CSV file, one row per datum.")] = None,
    task: Annotated[str | None, typer.Option(help="Column that names a row's task.")] = None,
    inputs: Annotated[str, typer.Option(help="Input columns, separated by commas.")] = "",
    target: Annotated[str | None, typer.Option(help="Target column.")] = None,
    shared: Annotated[
        str, typer.Option(help="Latent sites with one value for all tasks, by commas.")
    ] = "",
    query: Annotated[float, typer.Option(help="Share of each task's rows to hold out.")] = 0.3,
    hold_out: Annotated[
        int | None, typer.Option(help="Whole tasks to hold out; default a sixth of them.")
    ] = None,
    strategies: Annotated[
        str, typer.Option(help=f"By commas, of: {', '.join(STRATEGIES)}.")
    ] = _DEFAULT,
    out: Annotated[Path | None, typer.Option(help="Output folder; default runs/NAME.")] = None,
    seed: Annotated[int, typer.Option(help="Of the splits and of every strategy.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the run in the output folder.")] = False,
) -> None:
    """Fit every strategy to the same tasks, score them on held-out rows, draw the pictures."""
    console = Console()
    try:
        chosen = [_strategy(name.strip()) for name in _split(strategies)]
        if problem in PROBLEMS:
            given = {"--data": data, "--task": task, "--inputs": inputs, "--target": target}
            extra = [name for name, value in given.items() if value]
            if extra:
                raise ValueError(f"{extra[0]} goes with a model of your own, not with {problem!r}")
            label, case = problem, PROBLEMS[problem](seed)
        else:
            label, case = _own_problem(
                problem, data, task, inputs, target, shared, query, hold_out, seed
            )
        folder = out or Path("runs") / label
        console.print(f"{case.train}" + (f" and {case.new} never seen" if case.new else ""))
        result = run_comparison(
            chosen,
            case.density,
            case.train,
            case.new,
            seed=seed,
            folder=folder,
            overwrite=overwrite,
        )
    except (ValueError, OSError, FloatingPointError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {_plain(error)}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stop:
        Console(stderr=True, soft_wrap=True).print(
            f"Stopped: {_plain(stop) or 'nothing was running'}.\n"
            "Finished strategies are kept. The same command, without --overwrite, goes on."
        )
        raise typer.Exit(130) from None
    typer.echo(str(result))
    files = sorted(path for path in folder.iterdir() if path.is_file())
    console.print(f"Files in {folder}/: " + ", ".join(path.name for path in files))


@app.command()
def figures(
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("figures"),
    only: Annotated[str | None, typer.Option(help="One picture, by its name.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer tasks and points: seconds.")] = False,
) -> None:
    """Draw the story of the anchor, from one task's minima to meta-training with noise."""
    from varmeta.figures import FIGURES, draw_each  # matplotlib's animations, for this alone

    console = Console()
    written = []
    try:
        for path in track(
            draw_each(folder, only=only, quick=quick),
            description="Drawing",
            total=1 if only else len(FIGURES),
            console=console,
            disable=not console.is_terminal,
        ):
            written.append(path.name)
    except (ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {_plain(error)}")
        raise typer.Exit(2) from None
    console.print(f"Files in {folder}/: " + ", ".join(written))


def _strategy(name: str) -> Strategy:
    if name not in STRATEGIES:
        raise ValueError(f"strategies: no strategy {name!r}; there are: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]()


def _own_problem(
    spec: str,
    data: Path | None,
    task: str | None,
    inputs: str,
    target: str | None,
    shared: str,
    query: float,
    hold_out: int | None,
    seed: int,
) -> tuple[str, Problem]:
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ValueError(
            f"no shipped problem {spec!r}; there are: {', '.join(PROBLEMS)}. For a model of your "
            "own give FILE.py:FUNCTION"
        )
    for option, value in (("--data", data), ("--task", task), ("--target", target)):
        if value is None:
            raise ValueError(
                f"{option} is missing; a model of your own needs --data, --task, --target"
            )
    assert data is not None and task is not None and target is not None
    if not data.is_file():
        raise ValueError(f"--data: no file {str(data)!r}")
    tasks = Tasks.from_csv(data, task=task, inputs=_split(inputs), target=target)
    count = len(tasks) // 6 if hold_out is None else hold_out
    model = load_model(Path(path), name)
    label = f"{Path(path).stem}_{name}"
    return label, Problem.make(
        model, tasks, shared=_split(shared), query=query, hold_out=count, seed=seed
    )


def load_model(path: Path, name: str) -> Model:
    """The function or module `name` of the Python file `path`.

    Raises:
        ValueError: no such file, or no such name in it.
    """
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        own = [
            n
            for n, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", None) == module.__name__
        ]
        raise ValueError(f"{path} has no model {name!r}; it defines: {', '.join(own) or 'none'}")
    model: Model = found
    return model


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _plain(error: BaseException) -> str:
    """The message, with brackets kept from being read as markup."""
    return str(error).replace("[", r"\[")
