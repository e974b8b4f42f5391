"""What is learned: densities, priors, the hierarchy, and ready models."""

from varmeta.models.density import Density
from varmeta.models.hierarchy import hierarchy
from varmeta.models.network import network
from varmeta.models.prior import GaussianPrior, Hyperprior
from varmeta.models.sinusoid import sinusoids

__all__ = ["Density", "GaussianPrior", "Hyperprior", "hierarchy", "network", "sinusoids"]
