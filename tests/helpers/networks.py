"""Networks whose features are known by hand."""

import torch
from torch import nn


class RowMeans(nn.Module):
    """Each channel's mean, and its mean in the upper half: 6 values known by hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        upper = images[:, :, : images.shape[2] // 2]
        return torch.cat([images.mean((2, 3)), upper.mean((2, 3))], dim=1) * self.weight
