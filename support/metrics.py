"""The figures that say how good images are, of features, of pixels, or of the Inception network that papers use."""

import math
from typing import Any

import torch
from torch import Tensor

from support.classifier import as_judged
from support.command_line import Progress
from support.errors import UserError, believing, optional
from support.files import load_file


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D), in float64."""
    a, b = a.double(), b.double()
    gap, cov_a, cov_b = a.mean(0) - b.mean(0), a.T.cov(), b.T.cov()
    # tr (C_a C_b)^(1/2) is the sum of the square roots of the eigenvalues of C_a C_b, real and not negative.
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0)
    return (gap.square().sum() + cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()).item()


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL(p(y|x) || p(y)) of logits (N, K): 1 ... K."""
    log_p = logits.double().log_softmax(1)
    log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp().item()


def kth_neighbour(features: Tensor, k: int = 3) -> Tensor:
    """Distance of each of features (N, D) to its k-th nearest neighbour among the others -> (N,)."""
    return torch.cat([torch.cdist(part, features).kthvalue(k + 1, dim=1).values for part in features.split(1000)])


def share_within(points: Tensor, among: Tensor, radii: Tensor) -> float:
    """The share of points (N, D) that lie within some ball around `among` (M, D) with its radius (M,)."""
    inside = [(torch.cdist(part, among) <= radii).any(1) for part in points.split(1000)]
    return torch.cat(inside).float().mean().item()


def nearest_distance(images: Tensor, training: Tensor, among: Tensor) -> float:
    """Mean over images (N, C, H, W) of the Euclidean distance to the nearest of the training images of an index.

    Both are uint8 and become floats in [-1, 1] of at most 64 x 64 pixels, the training images (M, C, H, W) few at a
    time, for they may be more than fit in memory.
    """
    x = torch.cat([as_judged(part).flatten(1) for part in images.split(200)])
    closest = torch.full((len(x),), -math.inf)
    for index in among.split(2000):
        t = as_judged(training[index]).flatten(1)
        half_norms = t.square().sum(1) / 2
        for i, part in enumerate(x.split(500)):
            # |x - t|^2 = |x|^2 - 2 (x t - |t|^2 / 2): one matrix product, twice as fast as torch.cdist here.
            found = closest[500 * i : 500 * i + len(part)]
            torch.maximum(found, torch.addmm(half_norms, part, t.T, beta=-1).amax(1), out=found)
    return (x.square().sum(1) - 2 * closest).clamp(min=0).sqrt().mean().item()


def inception_distance(weights: str | None, device: torch.device) -> Any:
    """torchmetrics' FrechetInceptionDistance with the Inception v3 and the resizing of the original (Heusel, 2017).

    Args:
        weights: a file of torch-fidelity's (weights-inception-2015-12-05-6726825d.pth), which otherwise are downloaded.

    Raises:
        UserError: without the packages, the network, or for a file that holds no such weights.
    """
    FrechetInceptionDistance = optional("torchmetrics.image.fid", "--fid").FrechetInceptionDistance
    optional("torch_fidelity", "--fid")
    options = dict(reset_real_features=False, antialias=False)  # antialias would be another figure than that of papers
    if weights:
        # torch-fidelity reads the file trustingly, so that it is first seen to hold plain weights.
        load_file(weights, "download it from the releases of github.com/toshas/torch-fidelity")
        with believing(f"--inception {weights} holds no Inception of torch-fidelity"):
            return FrechetInceptionDistance(2048, feature_extractor_weights_path=str(weights), **options).to(device)
    try:
        return FrechetInceptionDistance(2048, **options).to(device)
    except (OSError, RuntimeError) as error:  # no network, no room, or a file cut short
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--fid: Inception's weights cannot be had ({reason}); name a file of them with --inception FILE"
        ) from error


def update_distance(fid: Any, images: Tensor, real: bool, what: str) -> None:
    """Show torchmetrics' FID images (N, C, H, W) uint8, grey or in colour, which may be on disk, some at a time."""
    parts = images.split(100)
    with Progress(len(parts), what) as bar:
        for part in parts:
            fid.update(part.expand(-1, 3, -1, -1).to(fid.device), real=real)
            bar.update()
