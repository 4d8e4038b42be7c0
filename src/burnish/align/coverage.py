"""How well a sampler covers a target: covariances of features under a policy, and what they say about each other.

All covariances are centred for each context (prompt): what two responses share says nothing about which is preferred.
For two independent draws of one context, E[z z'] of their difference is twice the covariance.

Source: arXiv 2601.08421. That on-policy sampling improves coverage is in its abstract; the quantities here, their names
and the bound are reconstructions of ours, and its deviation-based coverage, whose definition could not be read, is not
among them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OUTSIDE = 1e-9
"""Directions in which a sampler has less than this share of its largest variance count as not sampled."""


def sampling_covariance(probabilities: Tensor, features: Tensor) -> Tensor:
    """E_x Cov_{a ~ pi(.|x)}[phi(x, a)] over equally likely contexts, exactly, [..., d, d].

    Args:
        probabilities: pi(a|x), [..., contexts, actions].
        features: phi(x, a), [contexts, actions, d].
    """
    mean = torch.einsum("...xa,xad->...xd", probabilities, features)
    centred = features - mean.unsqueeze(-2)  # [..., contexts, actions, d]
    return torch.einsum("...xa,...xad,...xae->...de", probabilities, centred, centred) / len(features)


def sample_covariance(features: Sequence[Tensor] | Tensor) -> Tensor:
    """The same from samples, without bias: the mean over prompts of their sample covariances, [d, d] float64.

    Args:
        features: for each prompt those of its responses, Tensor [responses, d]; prompts with a single one are left out.

    Raises:
        ValueError: no prompt has two responses.
    """
    found = [
        (responses - responses.mean(0)).double() / (len(responses) - 1) ** 0.5
        for responses in features
        if len(responses) > 1
    ]
    if not found:
        raise ValueError("no prompt has two responses: coverage needs at least 2 samples a prompt")
    centred = torch.cat(found)
    return centred.mT @ centred / len(found)


def relative_variances(sampler: Tensor, target: Tensor, *, ridge: float = 0.0) -> Tensor:
    """Variance of the target over that of the sampler in each of their common axes, [..., d], ascending.

    The eigenvalues of Sigma_sampler^-1 Sigma_target; all 1 where both are equal, and unchanged by an invertible linear
    map of the features. An axis that the sampler never moves along is infinite if the target does and 0 if not.

    Args:
        sampler: covariance, [..., d, d].
        target: covariance, [..., d, d].
        ridge: share of the mean variance of the target that is added to both, for covariances of few samples.
    """
    target, sampler = target.double(), sampler.double()
    added = ridge * target.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(target.shape[-1]).to(target)
    target, sampler = target + added, sampler + added
    values, vectors = torch.linalg.eigh(sampler)
    inside = values > OUTSIDE * values[..., -1:]
    root = vectors * torch.where(inside, values, torch.inf).rsqrt().unsqueeze(-2)  # sampler = 1 in these coordinates
    found = torch.linalg.eigvalsh(root.mT @ target @ root).clamp(min=0)
    unseen = torch.where(inside, 0.0, (vectors * (target @ vectors)).sum(-2)).sum(-1)
    missed = unseen > OUTSIDE * target.diagonal(dim1=-2, dim2=-1).sum(-1)
    last = torch.arange(found.shape[-1], device=found.device) == found.shape[-1] - 1
    return torch.where(missed.unsqueeze(-1) & last, torch.inf, found)


def spectral_coverage(sampler: Tensor, target: Tensor, *, ridge: float = 0.0) -> Tensor:
    """C = lambda_max(Sigma_sampler^-1 Sigma_target), [...]: 1 if both are equal, large if the target is rarely sampled.

    It is the least C with Var_target[v' phi] <= C Var_sampler[v' phi] for every v. Arguments as `relative_variances`.

    Source: the coverage coefficient of arXiv 2506.01523, definition 3, for the linear class (reconstructed).
    """
    return relative_variances(sampler, target, ridge=ridge)[..., -1]


def trace_coverage(sampler: Tensor, target: Tensor, *, ridge: float = 0.0) -> Tensor:
    """C_tr = tr(Sigma_sampler^-1 Sigma_target), [...]: d if both are equal. Arguments as `relative_variances`.

    A logistic fit to n pairs of the sampler ends at a KL to the target of about C_tr / (n beta^2) where margins are
    small (ours, asymptotic).
    """
    return relative_variances(sampler, target, ridge=ridge).sum(-1)


def log_determinant(covariance: Tensor, ridge: float) -> Tensor:
    """log det(1 + Sigma / ridge), [...]: 0 for a policy that always answers the same, then growing with its variety.

    Args:
        covariance: [..., d, d].
        ridge: the variance that counts as none, in squared units of the features; the same for all that are compared.

    Raises:
        ValueError: ridge is not positive.
    """
    if ridge <= 0:
        raise ValueError(f"ridge={ridge}: expected a variance above 0")
    return (torch.eye(covariance.shape[-1]).to(covariance) + covariance / ridge).double().logdet()


def growth_bound(features: Tensor, theta: Tensor, target: Tensor) -> Tensor:
    """exp(2 L ||theta - theta*||), L the largest norm of features: bounds coverage in the linear softmax class, [...].

    The probabilities of two members differ by at most this factor, and so do variances: every relative variance lies
    between its inverse and it. That is why coverage improves as a policy comes closer to the target.

    Args:
        features: [contexts, actions, d].
        theta: [..., d].
        target: theta*, [d].

    Source: ours; arXiv 2601.08421 assumes local growth of coverage, its constant could not be read.
    """
    return torch.exp(2 * features.norm(dim=-1).max() * (theta - target).norm(dim=-1))
