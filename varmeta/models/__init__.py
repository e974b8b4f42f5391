"""What is learned: densities, priors, the hierarchy, and ready models."""

from varmeta.models.density import Density
from varmeta.models.hierarchy import hierarchy
from varmeta.models.hyperprior import Hyperprior
from varmeta.models.modular import PlantedModules, linear_modules, spiral_modules
from varmeta.models.modules import Modules
from varmeta.models.network import mask_classes, network
from varmeta.models.prior import GaussianPrior
from varmeta.models.sinusoid import sinusoids

__all__ = [
    "Density",
    "GaussianPrior",
    "Hyperprior",
    "Modules",
    "PlantedModules",
    "hierarchy",
    "linear_modules",
    "mask_classes",
    "network",
    "sinusoids",
    "spiral_modules",
]
