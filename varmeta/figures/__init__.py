"""Toy tasks in one dimension, an anchor, and what meta-gradients make of them, in pictures."""

from varmeta.figures.grid import Chain, Law, Mechanisms
from varmeta.figures.toy import Toy, descend, draw_tasks, implicit_slope, lowest, stationary

__all__ = [
    "Chain",
    "Law",
    "Mechanisms",
    "Toy",
    "descend",
    "draw_tasks",
    "implicit_slope",
    "lowest",
    "stationary",
]
