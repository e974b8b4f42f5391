"""The command line: `varmeta compare radon`, or with your own model and data; `varmeta figures`."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM
from types import ModuleType
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.text import Text

from varmeta import __version__
from varmeta.comparison import Comparison
from varmeta.comparison import compare as run_comparison
from varmeta.failures import expected, explain, own_line
from varmeta.inference.base import Strategy
from varmeta.inference.stopping import Terminated, terminating
from varmeta.loading import load, strategies_in
from varmeta.models.sites import Model
from varmeta.prediction_files import predict_file
from varmeta.problems import PROBLEMS, Problem
from varmeta.runs import MODEL_PLACE, said
from varmeta.settings import DEFAULT, STRATEGIES, choose, described, table_names
from varmeta.tasks import Tasks

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
    inputs: Annotated[
        str | None, typer.Option(help="Input columns, separated by commas; default none.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Target column.")] = None,
    shared: Annotated[
        str | None, typer.Option(help="Latent sites with one value for all tasks, by commas.")
    ] = None,
    query: Annotated[
        float | None, typer.Option(help="Share of each task's rows to hold out; default 0.3.")
    ] = None,
    hold_out: Annotated[
        int | None, typer.Option(help="Whole tasks to hold out; default a sixth of them.")
    ] = None,
    strategies: Annotated[
        str, typer.Option(help=f"By commas, of: {', '.join(STRATEGIES)}; or of tables of --config.")
    ] = DEFAULT,
    steps: Annotated[
        int | None, typer.Option(help="Upper limit of steps, of every strategy that takes steps.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Where learning ends, of every strategy that tests its convergence."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME.FIELD=VALUE",
            help="A setting of a strategy, such as joint.q=full, "
            "imaml.minimiser.max_iterations=100 or 'joint-reset.resets=Reset(100)'. Repeatable.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of settings, a table for each strategy. A table with a name of its own "
            "and, say, strategy = 'joint' is one more strategy of this run."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; default runs/NAME.")] = None,
    seed: Annotated[int, typer.Option(help="Of the splits and of every strategy.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the run in the output folder.")] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of what fails.")] = False,
) -> None:
    """Fit every strategy to the same tasks, score them on held-out rows, draw the pictures.

    Exit status: 0 if all went well; 1 if a strategy failed (the table says why, the tracebacks are
    in the output folder's failures/, and the same command tries those strategies again); 2 if
    nothing could be compared; 130 after Ctrl-C, 143 after SIGTERM.
    """
    console = Console()
    with _in_plain_words(debug):
        chosen = choose(
            _split(strategies),
            steps=steps,
            tolerance=tolerance,
            settings=settings or (),
            config=config,
        )
        if problem in PROBLEMS:
            given: dict[str, object] = {"--data": data, "--task": task, "--inputs": inputs}
            given |= {
                "--target": target,
                "--shared": shared,
                "--query": query,
                "--hold-out": hold_out,
            }
            extra = [name for name, value in given.items() if value is not None]
            if extra:
                raise ValueError(
                    f"{', '.join(extra)}: goes with a model of your own, FILE.py:FUNCTION, and not "
                    f"with {problem!r}, which has all of it; leave it out"
                )
            label, case = problem, PROBLEMS[problem](seed)
        else:
            label, case = _own_problem(
                problem, data, task, inputs, target, shared, query, hold_out, seed
            )
        folder = out or Path("runs") / label
        _say(console, f"{case.train}" + (f" and {case.new} never seen" if case.new else ""))
        for name, strategy in chosen.items():
            _say(console, f"{name}: {described(_settled(strategy, case))}")
        result = run_comparison(
            table_names(chosen),
            case.density,
            case.train,
            case.new,
            seed=seed,
            folder=folder,
            overwrite=overwrite,
            model_place=_place(problem),
        )
        folder = result.folder or folder
        typer.echo(str(result))
        files = sorted(path for path in folder.iterdir() if path.is_file())
        _say(console, f"Files in {folder}/: " + ", ".join(path.name for path in files))
        if result.failures:
            _say_failed(result, folder, debug)
            raise typer.Exit(1)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Output folder of varmeta compare.")],
    data: Annotated[
        Path,
        typer.Option(
            help="CSV file with the run's columns; rows whose target is empty, or all if "
            "it has no such column, are predicted."
        ),
    ],
    out: Annotated[Path, typer.Option(help="CSV file to write.")] = Path("predictions.csv"),
    strategy: Annotated[
        str | None, typer.Option(help="One of the run; default the best on known tasks.")
    ] = None,
    quantiles: Annotated[
        str, typer.Option(help="Of the predictions, by commas.")
    ] = "0.05,0.5,0.95",
    draws: Annotated[int, typer.Option(help="Draws to write for each row, as columns.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="FILE.py:FUNCTION, if the model is no longer where it was.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the file to write.")] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of what fails.")] = False,
) -> None:
    """Predict rows without a target: of known tasks, of new ones with some rows or with none.

    The rows are written with all of their columns, what their task is known by, and mean, standard
    deviation and quantiles of each prediction. Rows with a target say more of their task.
    """
    with _in_plain_words(debug):
        place = model or said(run, MODEL_PLACE)
        if not place:
            raise ValueError(
                f"{run} does not say where its model is: a program wrote it; give it by "
                "--model FILE.py:FUNCTION"
            )
        loaded = PROBLEMS[place](0).density.model if place in PROBLEMS else _model_at(place)
        if strategy in STRATEGIES and strategy not in strategies_in(run):
            strategy = STRATEGIES[strategy]().name  # as tables and files have it
        done = predict_file(
            load(run, loaded, strategy=strategy),
            data,
            out,
            quantiles=[float(q) for q in _split(quantiles)],
            keep=draws,
            seed=seed,
            overwrite=overwrite,
        )
        _say(Console(), done)


@app.command()
def figures(
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("figures"),
    only: Annotated[str | None, typer.Option(help="One picture, by its name.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer tasks and points: seconds.")] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of what fails.")] = False,
) -> None:
    """Draw the story of the anchor, from one task's minima to meta-training with noise."""
    from varmeta.figures import FIGURES, draw_each  # matplotlib's animations, for this alone

    console = Console()
    written = []
    with _in_plain_words(debug):
        for path in track(
            draw_each(folder, only=only, quick=quick),
            description="Drawing",
            total=1 if only else len(FIGURES),
            console=console,
            disable=not console.is_terminal,
        ):
            written.append(path.name)
        _say(console, f"Files in {folder}/: " + ", ".join(written))


@contextmanager
def _in_plain_words(debug: bool) -> Iterator[None]:
    """Errors and warnings as sentences on stderr; tracebacks where they are asked for."""
    console = Console(stderr=True, soft_wrap=True)

    def warn(message: Warning | str, *_: object) -> None:
        console.print(Text.assemble(("Warning: ", "bold yellow"), str(message)))

    with warnings.catch_warnings(), terminating():
        warnings.showwarning = warn  # type: ignore[assignment]
        warnings.filterwarnings("always", category=RuntimeWarning, module="varmeta")  # ours
        try:
            yield
        except typer.Exit:
            raise
        except KeyboardInterrupt as stop:
            _say(
                console,
                f"Stopped{f': {stop}' if str(stop) else ''}.\n"
                "What is finished is kept. The same command, without --overwrite, goes on.",
            )
            raise typer.Exit(130) from None
        except Terminated:
            _say(
                console,
                "Stopped by SIGTERM.\n"
                "What is finished is kept. The same command, without --overwrite, goes on.",
            )
            raise typer.Exit(128 + SIGTERM) from None
        except Exception as error:
            if debug:
                _say(console, "".join(traceback.format_exception(error)))
            console.print(Text.assemble(("Error: ", "bold red"), explain(error)))
            if not (debug or expected(error) or own_line(error)):
                _say(console, "Run again with --debug for the traceback.")
            raise typer.Exit(2) from None


def _say(console: Console, text: str) -> None:
    """Text as it is: names may hold what rich would take for markup."""
    console.print(text, markup=False, highlight=False, emoji=False)


def _say_failed(result: Comparison, folder: Path, debug: bool) -> None:
    console = Console(stderr=True, soft_wrap=True)
    if debug:
        for text in result.tracebacks.values():
            _say(console, text)
    total = result.table["strategy"].nunique()
    count = f"{len(result.failures)} of {total}" if len(result.failures) < total else "All"
    _say(
        console,
        f"{count} strategies failed: {', '.join(result.failures)}. Their tracebacks are in "
        f"{folder / 'failures'}/; the same command tries them again, and them alone.",
    )


def _settled(strategy: Strategy, case: Problem) -> Strategy:
    """With the choices made that it leaves open; as it is if it refuses this problem."""
    try:
        return strategy.settled(case.density, whole=True)
    except ValueError:
        return strategy


def _place(problem: str) -> str:
    """Where the model is, wherever `varmeta predict` is called from."""
    path, _, name = problem.rpartition(":")
    return problem if problem in PROBLEMS else f"{Path(path).resolve()}:{name}"


def _model_at(place: str) -> Model:
    path, colon, name = place.rpartition(":")
    if not colon or not Path(path).is_file():
        raise ValueError(
            f"no file {path or place!r}, where the model was; give it by --model FILE.py:FUNCTION"
        )
    return load_model(Path(path), name)


def _own_problem(
    spec: str,
    data: Path | None,
    task: str | None,
    inputs: str | None,
    target: str | None,
    shared: str | None,
    query: float | None,
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
    share = 0.3 if query is None else query
    if not 0 <= share < 1:
        raise ValueError(f"--query must lie between 0 and below 1, got {share:g}; 0 holds out none")
    if not data.is_file():
        raise ValueError(f"--data: no file {str(data)!r}; give a CSV file that is there")
    model = load_model(Path(path), name)
    tasks = Tasks.from_csv(data, task=task, inputs=_split(inputs or ""), target=target)
    count = len(tasks) // 6 if hold_out is None else hold_out
    if not 0 <= count < len(tasks):
        raise ValueError(
            f"--hold-out must lie between 0 and {len(tasks) - 1}, got {count}: there are "
            f"{len(tasks)} tasks, and one must be left to learn from"
        )
    label = f"{Path(path).stem}_{name}"
    made = Problem.make(
        model, tasks, shared=_split(shared or ""), query=share, hold_out=count, seed=seed
    )
    parts = [part for part in (made.train, made.new) if part is not None]
    if share and not any(bool(part.is_query.any()) for part in parts):
        raise ValueError(
            f"--query {share:g} finds no row to hold out: each of the {len(tasks)} tasks of --task "
            f"{task!r} has too few. Name another column, or give --query 0 to fit without scores"
        )
    return label, made


def load_model(path: Path, name: str) -> Model:
    """The function or module `name` of the Python file `path`.

    While the file is loaded it is a module of its own and may import its neighbours; then
    `sys.path` is as it was.

    Raises:
        ValueError: no such file, or no such name in it.
    """
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r}; give FILE.py:FUNCTION of a file that is there")
    # A name that no library has: it stands in sys.modules, where dataclasses look it up.
    spec = importlib.util.spec_from_file_location(f"varmeta_model_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _importing(module, path.resolve().parent):
        try:
            spec.loader.exec_module(module)
        except SystemExit:
            raise ValueError(f"{path} ended the program when it was loaded (SystemExit)") from None
    found = getattr(module, name, None)
    own = [
        n
        for n, v in vars(module).items()
        if callable(v) and getattr(v, "__module__", None) == module.__name__
    ]
    if isinstance(found, type):
        raise ValueError(
            f"{path}: {name!r} is a class; name an object of it: write model = {name}() there and "
            f"give {path}:model"
        )
    if not callable(found):
        raise ValueError(f"{path} has no model {name!r}; it defines: {', '.join(own) or 'none'}")
    model: Model = found
    return model


@contextmanager
def _importing(module: ModuleType, folder: Path) -> Iterator[None]:
    """`module` among the modules and its folder on the path; then both lists are as they were.

    Neighbours that it has imported leave too, so that another folder's of the same name are found.
    """
    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - known:
            file = Path(getattr(sys.modules[name], "__file__", None) or "/")
            library = "site-packages" in file.parts  # of an environment that lies in the folder
            if file.resolve().is_relative_to(folder) and not library:
                del sys.modules[name]


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
