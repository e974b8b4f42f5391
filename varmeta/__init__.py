"""varmeta: Bayesian and variational meta-learning on PyTorch, Pyro and ArviZ.

Data flow one way: `Tasks` → `Density` (a Pyro model of one task) → `GaussianPrior` → a strategy →
`fit` → `TaskPosterior` → `to_arviz` or `compare`.
"""

from importlib.metadata import version as _version

from varmeta.comparison import Comparison, compare
from varmeta.design import Design
from varmeta.export import from_netcdf, to_arviz
from varmeta.files import BrokenFile, FileInUse, NotWritten
from varmeta.formula_model import FormulaModel, from_formula
from varmeta.importance import Evidence, Loo, evidence, loo
from varmeta.inference.abml import ABML
from varmeta.inference.amortised import (
    AmortisedVariational,
    LaplaceEvidence,
    laplace_evidence,
)
from varmeta.inference.approximate import BlockDiagonal, Diagonal, PriorDominated
from varmeta.inference.at_ends import (
    BasinCorrected,
    ImplicitAtParticles,
    StationaryCovariance,
)
from varmeta.inference.base import (
    NonFiniteLoss,
    NonFinitePosterior,
    NotConverged,
    Strategy,
    UndeterminedScale,
)
from varmeta.inference.basins import Basins, find_basins
from varmeta.inference.check import GradientCheck, check_gradient
from varmeta.inference.connectivity import ModePath, mode_path
from varmeta.inference.descent import SGD, Langevin, RandomDescent, RandomRestarts
from varmeta.inference.estimators import BismutElworthyLi, Pathwise, Score
from varmeta.inference.evolution import EvolutionStrategies, PersistentES
from varmeta.inference.fit import fit
from varmeta.inference.fitted import Fit
from varmeta.inference.flow import GradientFlow
from varmeta.inference.gated import CurvatureGated
from varmeta.inference.gated_path import GatedPathwise
from varmeta.inference.imaml import IMAML
from varmeta.inference.joint import JointVariational
from varmeta.inference.lbfgs import LBFGS
from varmeta.inference.linear import CG, Cholesky, Neumann
from varmeta.inference.logdet import LogDet
from varmeta.inference.maml import FOMAML, MAML, MetaSGD, Reptile
from varmeta.inference.mechanisms import Mechanisms, mechanisms, mechanisms_at
from varmeta.inference.minimise import Adam, GradientDescent, ProximalDescent
from varmeta.inference.minres import MINRES
from varmeta.inference.modes import map_estimate
from varmeta.inference.nested import NestedLaplace
from varmeta.inference.newton import NewtonCG
from varmeta.inference.nuts import PyroNUTS
from varmeta.inference.nystrom import Nystrom
from varmeta.inference.pooling import CompletePooling, NoPooling
from varmeta.inference.prox import Detached, Implicit, OneStep, Unrolled, prox
from varmeta.inference.reachability import reachability_gap
from varmeta.inference.resets import Reset
from varmeta.inference.sigma import SigmaIMAML, SigmaMAML, SigmaReptile
from varmeta.inference.stochastic import Stochastic, meta_gradient
from varmeta.inference.stopping import Terminated
from varmeta.inference.svi import PyroSVI
from varmeta.loading import load
from varmeta.models import Density, GaussianPrior, Modules, hierarchy
from varmeta.posterior import TaskPosterior
from varmeta.prediction import Predictions
from varmeta.shrinkage import Shrinkage
from varmeta.tasks import Tasks, TaskSource

__version__ = _version("varmeta-ppl")

__all__ = [
    "ABML",
    "CG",
    "FOMAML",
    "IMAML",
    "LBFGS",
    "MAML",
    "MINRES",
    "SGD",
    "Adam",
    "AmortisedVariational",
    "BasinCorrected",
    "Basins",
    "BismutElworthyLi",
    "BlockDiagonal",
    "BrokenFile",
    "Cholesky",
    "Comparison",
    "CompletePooling",
    "CurvatureGated",
    "Density",
    "Design",
    "Detached",
    "Diagonal",
    "Evidence",
    "EvolutionStrategies",
    "FileInUse",
    "Fit",
    "FormulaModel",
    "GatedPathwise",
    "GaussianPrior",
    "GradientCheck",
    "GradientDescent",
    "GradientFlow",
    "Implicit",
    "ImplicitAtParticles",
    "JointVariational",
    "Langevin",
    "LaplaceEvidence",
    "LogDet",
    "Loo",
    "Mechanisms",
    "MetaSGD",
    "ModePath",
    "Modules",
    "NestedLaplace",
    "Neumann",
    "NewtonCG",
    "NoPooling",
    "NonFiniteLoss",
    "NonFinitePosterior",
    "NotConverged",
    "NotWritten",
    "Nystrom",
    "OneStep",
    "Pathwise",
    "PersistentES",
    "Predictions",
    "PriorDominated",
    "ProximalDescent",
    "PyroNUTS",
    "PyroSVI",
    "RandomDescent",
    "RandomRestarts",
    "Reptile",
    "Reset",
    "Score",
    "Shrinkage",
    "SigmaIMAML",
    "SigmaMAML",
    "SigmaReptile",
    "StationaryCovariance",
    "Stochastic",
    "Strategy",
    "TaskPosterior",
    "TaskSource",
    "Tasks",
    "Terminated",
    "UndeterminedScale",
    "Unrolled",
    "__version__",
    "check_gradient",
    "compare",
    "evidence",
    "find_basins",
    "fit",
    "from_formula",
    "from_netcdf",
    "hierarchy",
    "laplace_evidence",
    "load",
    "loo",
    "map_estimate",
    "mechanisms",
    "mechanisms_at",
    "meta_gradient",
    "mode_path",
    "prox",
    "reachability_gap",
    "to_arviz",
]
