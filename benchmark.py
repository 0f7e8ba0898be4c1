"""How fast and how big."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from dit import DiT


def count_gflops(model: DiT) -> float:
    """Gflops of a forward pass for one image, a multiply-add counted once, as the paper counts."""
    device, size = model.pos_embed.device, model.image_size
    x, t = torch.zeros(1, model.in_channels, size, size, device=device), torch.zeros(1, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, t.long())
    return counter.get_total_flops() / 2e9
