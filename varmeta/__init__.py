"""varmeta: Bayesian and variational meta-learning on PyTorch, Pyro and ArviZ."""

from varmeta.inference.fit import Fit, fit
from varmeta.inference.imaml import IMAML
from varmeta.inference.joint import JointVariational
from varmeta.inference.linear import CG
from varmeta.inference.minimise import GradientDescent, NewtonCG
from varmeta.inference.nuts import PyroNUTS
from varmeta.inference.pooling import CompletePooling, NoPooling
from varmeta.inference.prox import Implicit, prox
from varmeta.models.density import Density
from varmeta.models.hierarchy import hierarchy
from varmeta.models.prior import GaussianPrior
from varmeta.posterior import TaskPosterior
from varmeta.tasks import Tasks, TaskSource
