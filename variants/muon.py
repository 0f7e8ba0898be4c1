"""Muon, an optimizer of matrices (Jordan et al., 2024): `--optimizer muon`.

It makes all singular values of an update equal. torch.optim.Muon is one; here is which of a model's parameters it
gets, and with which settings.
"""

import torch
from torch import nn


def muon_for(blocks: nn.Module, weight_decay: float) -> torch.optim.Muon:
    """Muon for the blocks' matrices; the rest of a model is another optimizer's.

    match_rms_adamw scales an update to the size of one of AdamW's, so that both take the same learning rate (Liu et
    al., 2025).
    """
    matrices = [p for p in blocks.parameters() if p.ndim == 2]
    return torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
