"""Write here the test that fails on the planted bug, and passes once you have mended it.

Take numbers that you can work out with a pencil. This one passes, and shows the form.
"""

import torch

from lm import masked_mean


def test_masked_mean_by_hand():
    x, mask = torch.tensor([[1.0, 2.0], [6.0, 50.0]]), torch.tensor([[1, 1], [1, 0]])
    assert masked_mean(x, mask).item() == 3.0  # (1 + 2 + 6) / 3
