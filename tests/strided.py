"""Tensors [N, C, H, W] in every layout that a caller's may have, with the same values."""

import pytest
import torch
import torch.nn.functional as F

LAYOUTS = {
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "offset": lambda x: F.pad(x, (2, 0, 1, 0, 0, 0, 1, 0))[1:, :, 1:, 2:],
    "negative_bit": lambda x: torch.complex(-x, -x).conj().imag,
    "unaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}
IN_EVERY_LAYOUT = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
