"""Toy tasks in one dimension, an anchor, and what meta-gradients make of them, in pictures.

Each picture is a function of a toy task, with every number as a keyword; `draw_all` writes them
all. `Chain` gives the exact law of anchored Langevin dynamics, against which the gradient
estimators of `varmeta.Stochastic` are checked.
"""

from varmeta.figures.draw import FIGURES, draw_all, draw_each
from varmeta.figures.grid import Chain, Law, Mechanisms
from varmeta.figures.meta_training import Runs, train, training
from varmeta.figures.minima import descend, implicit_slope, jumps, lowest, stationary
from varmeta.figures.objectives import many_tasks, meta_objective, objective, smooth_but
from varmeta.figures.one_task import anchor, derivative, minimum, moving_anchor
from varmeta.figures.stochastic import Sweep, gradients, mechanisms, stochastic_objective, sweep
from varmeta.figures.style import Movie, save
from varmeta.figures.toy import Toy, draw_tasks

__all__ = [
    "FIGURES",
    "Chain",
    "Law",
    "Mechanisms",
    "Movie",
    "Runs",
    "Sweep",
    "Toy",
    "anchor",
    "derivative",
    "descend",
    "draw_all",
    "draw_each",
    "draw_tasks",
    "gradients",
    "implicit_slope",
    "jumps",
    "lowest",
    "many_tasks",
    "mechanisms",
    "meta_objective",
    "minimum",
    "moving_anchor",
    "objective",
    "save",
    "smooth_but",
    "stationary",
    "stochastic_objective",
    "sweep",
    "train",
    "training",
]
