"""The command line: `varmeta compare radon`, or with your own model and data; `varmeta figures`."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM
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
from varmeta.families import FAMILIES
from varmeta.files import write
from varmeta.formula_model import MODEL_FILE, WrittenModel
from varmeta.inference.base import Strategy
from varmeta.inference.stopping import Terminated, terminating
from varmeta.loading import load, strategies_in
from varmeta.model_files import load_model
from varmeta.models.prior import GaussianPrior
from varmeta.models.sites import Model
from varmeta.own_problems import Options, own_problem, split
from varmeta.prediction_files import predict_file
from varmeta.problems import PROBLEMS, Problem
from varmeta.runs import MODEL_PLACE, said
from varmeta.seeds import generator
from varmeta.settings import DEFAULT, STRATEGIES, choose, described, table_names

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
            help=f"A shipped problem ({', '.join(PROBLEMS)}), a formula such as "
            "'y ~ x + (1 + x | group)', or your model, my_model.py:function."
        ),
    ],
    data: Annotated[Path | None, typer.Option(help="CSV file, one row per datum.")] = None,
    task: Annotated[str | None, typer.Option(help="Column that names a row's task.")] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            help="Input columns by commas, C(name) to take numbers for levels, or a formula; "
            "default none."
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Target column.")] = None,
    shared: Annotated[
        str | None, typer.Option(help="Latent sites with one value for all tasks, by commas.")
    ] = None,
    query: Annotated[
        str | None,
        typer.Option(
            help="Share of each task's rows to hold out, default 0.3; or the column (0 or 1) that "
            "says which."
        ),
    ] = None,
    hold_out: Annotated[
        int | None,
        typer.Option(
            help="Whole tasks to hold out; default a sixth of them, or none with a --query column."
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(help=f"Law of a formula, default normal, of: {', '.join(FAMILIES)}."),
    ] = None,
    missing: Annotated[
        str | None,
        typer.Option(help="Rows with a missing value: error (default), or drop them."),
    ] = None,
    integers: Annotated[
        str | None,
        typer.Option(
            help="What stays whole numbers, with levels numbered from 0: inputs, target or both."
        ),
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
            split(strategies),
            steps=steps,
            tolerance=tolerance,
            settings=settings or (),
            config=config,
        )
        options = Options(
            data, task, inputs, target, shared, query, hold_out, family, missing, integers
        )
        with _problem(problem, options, seed) as (label, case):
            folder = out or Path("runs") / label
            _say(console, f"{case.train}" + (f" and {case.new} never seen" if case.new else ""))
            for phrase in case.train.design.described() if case.train.design else ():
                _say(console, phrase)
            if strategies == DEFAULT:
                chosen = _able(console, chosen, case)
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
                command=_typed(),
            )
        folder = result.folder or folder
        typer.echo(str(result))
        files = sorted(path for path in folder.iterdir() if path.is_file())
        _say(console, f"Files in {folder}/: " + ", ".join(path.name for path in files))
        _say(console, f"The whole of it as a page: {folder / 'report.html'}")
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
    deviation and quantiles of each prediction. Rows with a target say more of their task. The
    model's file is run, as is a formula of the run: take runs from people you trust.
    """
    with _in_plain_words(debug):
        place = model or said(run, MODEL_PLACE)
        if not place:
            raise ValueError(
                f"{run} does not say where its model is: a program wrote it; give it by "
                "--model FILE.py:FUNCTION"
            )
        loaded = PROBLEMS[place](0).density.model if place in PROBLEMS else _model_at(place, run)
        if strategy in STRATEGIES and strategy not in strategies_in(run):
            strategy = STRATEGIES[strategy]().name  # as tables and files have it
        done = predict_file(
            load(run, loaded, strategy=strategy),
            data,
            out,
            quantiles=[float(q) for q in split(quantiles)],
            keep=draws,
            seed=seed,
            overwrite=overwrite,
        )
        _say(Console(), done)


@app.command("model")
def print_model(
    formula: Annotated[str, typer.Argument(help="Such as 'y ~ x + (1 + x | group)'.")],
    data: Annotated[Path | None, typer.Option(help="CSV file, one row per datum.")] = None,
    family: Annotated[str, typer.Option(help=f"Law, of: {', '.join(FAMILIES)}.")] = "normal",
    missing: Annotated[
        str, typer.Option(help="Rows with a missing value: error, or drop them.")
    ] = "error",
    debug: Annotated[bool, typer.Option(help="Show the traceback of what fails.")] = False,
) -> None:
    """Print the Pyro model that a formula stands for: a Python file to be read, edited and run.

    Exit status: 0, or 2 if there is none.
    """
    with _in_plain_words(debug):
        made = Options(data=data, family=family, missing=missing).formula_model(formula)
        typer.echo(made.source, nl=False)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Output folder of varmeta compare.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; default RUN/report.html.")
    ] = None,
    debug: Annotated[bool, typer.Option(help="Show the traceback of what fails.")] = False,
) -> None:
    """Write a run as one HTML page that needs nothing else: verdict, tables, pictures, settings."""
    from varmeta.html_report import html_report  # jinja2, for this alone

    with _in_plain_words(debug):
        path = out or run / "report.html"
        write(path, html_report(run))
        _say(Console(), f"Written: {path}")


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


@contextmanager
def _problem(problem: str, options: Options, seed: int) -> Iterator[tuple[str, Problem]]:
    """A shipped problem or the user's own, with a name for its output."""
    if problem not in PROBLEMS:
        with own_problem(problem, options, seed) as found:
            yield found
        return
    options.refuse(
        "goes with a model of your own, FILE.py:FUNCTION, or a formula, and not with "
        f"{problem!r}, which has all of it"
    )
    yield problem, PROBLEMS[problem](seed)


def _able(console: Console, chosen: dict[str, Strategy], case: Problem) -> dict[str, Strategy]:
    """Those that nobody named, without those that refuse this model; each of these is said."""
    able, prior = {}, GaussianPrior.from_density(case.density)
    for name, strategy in chosen.items():
        try:
            settled = strategy.settled(case.density, whole=True)
            settled.init(case.density, prior, strategy.prepare(case.train.support, 0), generator(0))
        except ValueError as error:
            _say(console, f"{name} is left out: {error}")
        else:
            able[name] = strategy
    return able or chosen


def _settled(strategy: Strategy, case: Problem) -> Strategy:
    """With the choices made that it leaves open; as it is if it refuses this problem."""
    try:
        return strategy.settled(case.density, whole=True)
    except ValueError:
        return strategy


def _typed() -> str:
    """The command as it was typed; '' where another program runs it."""
    return shlex.join(["varmeta", *sys.argv[1:]]) if Path(sys.argv[0]).stem == "varmeta" else ""


def _place(problem: str) -> str:
    """Where the model is, wherever `varmeta predict` is called from; a formula's is in the run."""
    path, _, name = problem.rpartition(":")
    if "~" in problem:
        return ""
    return problem if problem in PROBLEMS else f"{Path(path).resolve()}:{name}"


def _model_at(place: str, run: Path) -> Model:
    path, colon, name = place.rpartition(":")
    if path == MODEL_FILE and (run / path).is_file():
        return WrittenModel((run / path).read_text(), name)
    if not colon or not Path(path).is_file():
        raise ValueError(
            f"no file {path or place!r}, where the model was; give it by --model FILE.py:FUNCTION"
        )
    return load_model(Path(path), name)
