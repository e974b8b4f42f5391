"""Closed-form oracle for linear-Gaussian meta-learning (numpy only; never imports varmeta).

Task i of T has support rows (X_i [n_i, D], y_i [n_i]) and query rows (Xq_i [nq_i, D], yq_i):
    y_i = X_i theta_i + N(0, s^2 I),  theta_i ~ N(theta0, Sigma),  Sigma = diag(sigma^2) = 1/Lambda.
Losses are negative log-likelihoods in nats, summed over rows, normalising constants included:
    f_i(theta) = |y_i - X_i theta|^2/(2 s^2) + n_i/2 log(2 pi s^2);  g_i: the same on query rows;
    E_i(theta) = f_i(theta) + (theta - theta0)' Lambda (theta - theta0)/2  (penalty: no constant).
Below H_i = X_i'X_i/s^2, A_i = H_i + Lambda, e_i = y_i - X_i theta0, C_i = s^2 I + X_i Sigma X_i',
d_i = theta_i* - theta0. Every objective is a sum over tasks; `subset` gives it for some of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]
LOG_2PI = float(np.log(2 * np.pi))


class Gradient(NamedTuple):
    """Exact gradient of a scalar objective in the three shared parameters."""

    theta0: Array  # [D]
    log_scale: Array  # [D]
    log_noise: float


class GaussianOptimum(NamedTuple):
    """Minimiser of the Gaussian joint objective J over q, theta0, sigma (and s, when fitted).

    collapsed[j]: the infimum lies in the corner sigma_j -> 0. Then scale[j] is exactly 0, column j
    of means is theta0[j], that of covs 0, and value is the limit of J, approached, not attained.
    converged: the last sweep changed no sigma_j^2 nor s^2 by more than 1e-14 (relative), and slope
    is not negative in a collapsed direction (elsewhere it is about 0).
    """

    theta0: Array  # [D]
    scale: Array  # [D], sigma
    noise: float  # s
    means: Array  # [T, D]
    covs: Array  # [T, D, D], diagonal unless full
    value: float
    collapsed: npt.NDArray[np.bool_]  # [D]
    slope: Array  # [D], dJ/d(sigma_j^2)
    sweeps: int
    converged: bool


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """Ragged tasks, and the shared parameters at which everything is evaluated."""

    designs: tuple[Array, ...]  # T of [n_i, D]
    targets: tuple[Array, ...]  # T of [n_i]
    query_designs: tuple[Array, ...]  # T of [nq_i, D]
    query_targets: tuple[Array, ...]  # T of [nq_i]
    theta0: Array  # [D]
    log_scale: Array  # [D], log sigma
    log_noise: float  # log s

    def __post_init__(self) -> None:
        xs, ys = (*self.designs, *self.query_designs), (*self.targets, *self.query_targets)
        assert len(self.designs) == len(self.targets) and self.log_scale.shape == (self.dim,)
        assert all(x.shape == (len(y), self.dim) for x, y in zip(xs, ys, strict=True))

    @classmethod
    def random(
        cls, seed: int, num_tasks: int = 6, dim: int = 3, max_rows: int = 7, max_query_rows: int = 4
    ) -> LinearGaussian:
        """Draw tasks from the model at the theta0, log_scale, log_noise drawn first. The n_i are
        max_rows, 1 and sizes between, shuffled; distinct if T <= max_rows."""
        rng = np.random.default_rng(seed)
        sizes = np.resize([max_rows, 1, *rng.permutation(np.arange(2, max_rows))], num_tasks)
        theta0, log_scale = rng.normal(size=dim), 0.3 * rng.normal(size=dim)
        log_noise = -0.7 + 0.2 * float(rng.normal())
        data: Any = ([], [], [], [])
        for rows in rng.permutation(sizes):
            theta = theta0 + np.exp(log_scale) * rng.normal(size=dim)
            for part, n in enumerate((rows, rng.integers(1, max_query_rows + 1))):
                x = rng.normal(size=(n, dim))
                data[2 * part].append(x)
                data[2 * part + 1].append(x @ theta + np.exp(log_noise) * rng.normal(size=n))
        designs, targets, xqs, yqs = map(tuple, data)
        return cls(designs, targets, xqs, yqs, theta0, log_scale, log_noise)

    def at(self, **shared: Any) -> LinearGaussian:
        """The same data at other shared parameters (theta0=, log_scale=, log_noise=)."""
        assert shared.keys() <= {"theta0", "log_scale", "log_noise"}
        return replace(self, **shared)

    def subset(self, *tasks: int) -> LinearGaussian:
        """Only the given tasks, in that order."""
        names = ("designs", "targets", "query_designs", "query_targets")
        data: Any = {name: tuple(getattr(self, name)[i] for i in tasks) for name in names}
        return replace(self, **data)

    @property
    def num_tasks(self) -> int:
        return len(self.designs)

    @property
    def dim(self) -> int:
        return len(self.theta0)

    @property
    def noise2(self) -> float:
        return float(np.exp(2 * self.log_noise))

    @property
    def precision(self) -> Array:
        return np.exp(-2 * self.log_scale)  # diagonal of Lambda [D]

    def support_loss(self, i: int, theta: Array) -> float:
        """f_i(theta)."""
        return _loss(self.designs[i], self.targets[i], theta, self.noise2)

    def query_loss(self, i: int, theta: Array) -> float:
        """g_i(theta)."""
        return _loss(self.query_designs[i], self.query_targets[i], theta, self.noise2)

    def penalised_loss(self, i: int, theta: Array) -> float:
        """E_i(theta)."""
        penalty = float(np.sum(self.precision * (theta - self.theta0) ** 2)) / 2
        return self.support_loss(i, theta) + penalty

    def hessian(self, i: int) -> Array:
        """H_i, the Hessian of f_i [D, D]."""
        return self.designs[i].T @ self.designs[i] / self.noise2

    def posterior_cov(self, i: int) -> Array:
        """A_i^-1 = (H_i + Lambda)^-1 [D, D]."""
        return np.linalg.inv(self.hessian(i) + np.diag(self.precision))

    def theta_star(self, i: int) -> Array:
        """argmin E_i = A_i^-1 (X_i'y_i/s^2 + Lambda theta0) [D], which is the posterior mean."""
        shift = self.designs[i].T @ self.targets[i] / self.noise2 + self.precision * self.theta0
        return np.linalg.solve(self.hessian(i) + np.diag(self.precision), shift)

    def theta_stars(self) -> Array:
        """All theta_i* [T, D]."""
        return np.stack([self.theta_star(i) for i in range(self.num_tasks)])

    def jacobian(self, i: int) -> Array:
        """d theta_i*/d theta0 = A_i^-1 Lambda [D, D]; rows are components of theta_i*."""
        return self.posterior_cov(i) * self.precision

    def log_predictive(self, i: int, mean: Array | None = None, cov: Array | None = None) -> Array:
        """log N(yq; xq'm, s^2 + xq'V xq) of each query row [nq_i] by itself. (m, V) is the
        exact posterior unless given; a 1-d cov is the diagonal of V."""
        mean = self.theta_star(i) if mean is None else mean
        cov = self.posterior_cov(i) if cov is None else np.diag(cov) if cov.ndim == 1 else cov
        xq = self.query_designs[i]
        variance: Array = self.noise2 + np.sum((xq @ cov) * xq, axis=1)
        z2 = (self.query_targets[i] - xq @ mean) ** 2 / variance
        return -0.5 * (z2 + np.log(variance) + LOG_2PI)

    def meta(self) -> float:
        """M = sum_i g_i(theta_i*)."""
        return sum(self.query_loss(i, self.theta_star(i)) for i in range(self.num_tasks))

    def meta_grad(self) -> Gradient:
        """Implicitly, with w_i = A_i^-1 grad g_i(theta_i*) and rq_i = yq_i - Xq_i theta_i*:
        theta0: Lambda w_i;  log sigma: 2 Lambda d_i * w_i;
        log s: nq_i - |rq_i|^2/s^2 - 2 w_i' X_i'(y_i - X_i theta_i*)/s^2.
        """
        parts = []
        for i, (x, xq) in enumerate(zip(self.designs, self.query_designs, strict=True)):
            star = self.theta_star(i)
            residual = self.query_targets[i] - xq @ star
            adjoint = -self.posterior_cov(i) @ xq.T @ residual / self.noise2
            score = x.T @ (self.targets[i] - x @ star) / self.noise2
            d_scale = 2 * self.precision * (star - self.theta0) * adjoint
            d_noise = len(xq) - residual @ residual / self.noise2 - 2 * adjoint @ score
            parts.append((self.precision * adjoint, d_scale, d_noise))
        return _total(parts)

    def log_marginal(self) -> float:
        """sum_i log N(y_i; X_i theta0, C_i)."""
        total = 0.0
        for i in range(self.num_tasks):
            error, cov = self._marginal(i)
            fit, logdet = error @ np.linalg.solve(cov, error), np.linalg.slogdet(cov)[1]
            total -= 0.5 * float(fit + logdet + len(error) * LOG_2PI)
        return total

    def log_marginal_grad(self) -> Gradient:
        """With a_i = C_i^-1 e_i and x_j column j of X_i:  theta0: X_i'a_i;
        log sigma_j: sigma_j^2 [(x_j'a_i)^2 - x_j'C_i^-1 x_j];  log s: s^2 [a_i'a_i - tr C_i^-1].
        """
        parts = []
        for i, x in enumerate(self.designs):
            error, cov = self._marginal(i)
            inverse = np.linalg.inv(cov)
            weighted = inverse @ error
            squares = (x.T @ weighted) ** 2 - np.diag(x.T @ inverse @ x)
            d_noise = self.noise2 * (weighted @ weighted - np.trace(inverse))
            parts.append((x.T @ weighted, squares / self.precision, d_noise))
        return _total(parts)

    def _marginal(self, i: int) -> tuple[Array, Array]:
        x = self.designs[i]
        cov = self.noise2 * np.eye(len(x)) + (x / self.precision) @ x.T
        return self.targets[i] - x @ self.theta0, cov  # e_i, C_i

    def amortised(self) -> float:
        """sum_i E_i(theta_i*)."""
        return self.delta_joint(self.theta_stars())

    def amortised_grad(self) -> Gradient:
        """By the envelope theorem:  theta0: -Lambda d_i;  log sigma: -Lambda d_i^2;
        log s: n_i - |y_i - X_i theta_i*|^2/s^2.
        """
        stars = self.theta_stars()
        rs = [y - x @ star for x, y, star in zip(self.designs, self.targets, stars, strict=True)]
        d_noise = sum(len(r) - float(r @ r) / self.noise2 for r in rs)
        shift = stars - self.theta0
        d_theta0, d_scale = -self.precision * shift.sum(0), -self.precision * (shift**2).sum(0)
        return Gradient(d_theta0, d_scale, d_noise)

    def delta_joint(self, thetas: Array) -> float:
        """sum_i E_i(theta_i) for thetas [T, D]."""
        return sum(self.penalised_loss(i, thetas[i]) for i in range(self.num_tasks))

    def delta_optimum(self) -> tuple[Array, Array, float]:
        """Minimiser (theta0 [D], thetas [T, D]) of delta_joint, and its value; sigma, s fixed.
        theta0 = mean theta_i* becomes sum_i A_i^-1 (H_i theta0 - X_i'y_i/s^2) = 0 (pooled rank D).
        """
        lhs, rhs = np.zeros((self.dim, self.dim)), np.zeros(self.dim)
        for i in range(self.num_tasks):
            lhs += self.posterior_cov(i) @ self.hessian(i)
            rhs += self.posterior_cov(i) @ (self.designs[i].T @ self.targets[i]) / self.noise2
        best = self.at(theta0=np.linalg.solve(lhs, rhs))
        return best.theta0, best.theta_stars(), best.amortised()

    def gaussian_joint(self, means: Array, covs: Array) -> float:
        """J = sum_i KL[N(m_i, V_i) | N(theta0, Sigma)] + f_i(m_i) + tr(H_i V_i)/2.

        means [T, D]; covs [T, D] (diagonals of V_i) or [T, D, D]. J >= -log_marginal().
        """
        total = 0.0
        for i, mean in enumerate(means):
            cov = np.diag(covs[i]) if covs.ndim == 2 else covs[i]
            scaled = np.sum(self.precision * (np.diag(cov) + (mean - self.theta0) ** 2))
            logdets = 2 * np.sum(self.log_scale) - np.linalg.slogdet(cov)[1]
            spread = np.sum(self.hessian(i) * cov)
            total += 0.5 * float(scaled - self.dim + logdets + spread) + self.support_loss(i, mean)
        return total

    def best_variances(self) -> Array:
        """v_ij = 1/(H_i,jj + 1/sigma_j^2) [T, D]: with theta_stars(), the best diagonal q here."""
        diagonals = np.stack([np.diag(self.hessian(i)) for i in range(self.num_tasks)])
        return 1 / (diagonals + self.precision)

    def gaussian_optimum(self, *, full: bool = False, fit_noise: bool = False) -> GaussianOptimum:
        """Minimise J over q, theta0, sigma (and s) by exact coordinate descent from these scales.

        A sweep takes (theta0, means, covs) jointly at fixed scales, then sigma_j^2 = mean_i[
        (m_ij - theta0_j)^2 + V_i,jj], s^2 = sum_i[|y_i - X_i m_i|^2 + tr(X_i'X_i V_i)]/sum_i n_i.
        With `full` this is EM and the optimum empirical Bayes: value = -log marginal.
        Sweeps approach sigma_j = 0 only as 1/sweeps, so every 200 sweeps a sigma_j for which 0 is
        no worse and has a non-negative slope is set to 0, where it stays. The minimum is local.
        """
        scale2, noise2, sweeps, change = np.exp(2 * self.log_scale), self.noise2, 0, np.inf
        now, rows = self._profile(scale2, noise2, full), sum(map(len, self.targets))
        while change > 1e-14 and sweeps < 20_000:
            old, sweeps = np.append(scale2, noise2), sweeps + 1
            spread = np.diagonal(now.covs, axis1=1, axis2=2)
            scale2 = np.mean((now.means - now.theta0) ** 2 + spread, axis=0)
            if fit_noise:
                fitted = zip(self.designs, self.targets, *now[3:5], strict=True)
                squares = (np.sum((y - x @ m) ** 2) + np.sum(x @ v * x) for x, y, m, v in fitted)
                noise2 = float(sum(squares)) / rows
            new = np.append(scale2, noise2)
            change = float(np.max(np.abs(new[old > 0] / old[old > 0] - 1)))
            now = self._profile(scale2, noise2, full)
            for j in np.flatnonzero(scale2) if sweeps % 200 == 0 else ():
                corner = np.where(np.arange(self.dim) == j, 0.0, scale2)
                there = self._profile(corner, noise2, full)
                if there.value <= now.value and there.slope[j] >= 0:
                    scale2, now, change = corner, there, np.inf
        converged = change <= 1e-14 and bool(np.all(now.slope[now.collapsed] >= 0))
        return now._replace(sweeps=sweeps, converged=converged)

    def _profile(self, scale2: Array, noise2: float, full: bool) -> GaussianOptimum:
        """Minimise J over q and theta0 without dividing by sigma: with K_i = (I + Sigma H_i)^-1,
        X_i'C_i^-1 X_i = H_i K_i, u_i = X_i'C_i^-1 e_i = K_i'X_i'e_i/s^2, m_i = theta0 + Sigma u_i,
        V_i = K_i Sigma (full) or sigma_j^2/(1 + H_i,jj sigma_j^2). J is then half of sum_i
        e_i'(y_i - X_i m_i)/s^2 + n_i log(2 pi s^2) + log|I + Sigma H_i|, where the first term is
        e_i'C_i^-1 e_i and the determinant is of the diagonal only unless full.
        """
        gram = np.stack([x.T @ x for x in self.designs])
        moment = np.stack([x.T @ y for x, y in zip(self.designs, self.targets, strict=True)])
        hessian = gram / noise2
        whitened = np.eye(self.dim) + scale2[:, None] * hessian
        shrink = np.linalg.inv(whitened)  # K_i
        pooled = np.einsum("tkj,tk->j", shrink, moment) / noise2
        theta0 = np.linalg.solve(np.sum(hessian @ shrink, axis=0), pooled)
        scores = np.einsum("tkj,tk->tj", shrink, moment - gram @ theta0) / noise2  # u_i
        means = theta0 + scale2 * scores
        if full:
            root = np.sqrt(scale2)
            inner = np.linalg.inv(np.eye(self.dim) + root[:, None] * hessian * root)
            covs = root[:, None] * inner * root  # K_i Sigma
            curvature = np.diagonal(hessian @ shrink, axis1=1, axis2=2)
            logdet = np.sum(np.linalg.slogdet(whitened)[1])
        else:
            diagonal = np.diagonal(whitened, axis1=1, axis2=2)
            covs = np.eye(self.dim) * (scale2 / diagonal)[:, None, :]
            curvature = np.diagonal(hessian, axis1=1, axis2=2) / diagonal
            logdet = np.sum(np.log(diagonal))
        fit = 0.0
        for x, y, mean in zip(self.designs, self.targets, means, strict=True):
            fit += (y - x @ theta0) @ (y - x @ mean) / noise2 + len(y) * (LOG_2PI + np.log(noise2))
        slope, value = 0.5 * np.sum(curvature - scores**2, axis=0), 0.5 * float(fit + logdet)
        optimum = (theta0, np.sqrt(scale2), float(np.sqrt(noise2)), means, covs, value)
        return GaussianOptimum(*optimum, scale2 == 0, slope, sweeps=0, converged=False)


def _loss(x: Array, y: Array, theta: Array, noise2: float) -> float:
    return 0.5 * float(np.sum((y - x @ theta) ** 2) / noise2 + len(y) * (LOG_2PI + np.log(noise2)))


def _total(parts: list[Any]) -> Gradient:
    theta0, log_scale, log_noise = zip(*parts, strict=True)
    return Gradient(np.sum(theta0, axis=0), np.sum(log_scale, axis=0), float(sum(log_noise)))
