"""The scale factors that one dense pass tries all at once."""

import torch
from torch import Tensor

TRIALS = 32
DECADES = 6


def trial_factors(keys: int) -> Tensor:
    """Ascending factors, float32 [32]: lambda = factor / keys goes from 1e-6 to 1, dense near 1.

    lambda_i = 10^(-6 (i / 31)^2): most skips, and most of their error, happen in the last decade.
    """
    share = torch.arange(TRIALS - 1, -1, -1, dtype=torch.float64) / (TRIALS - 1)
    return (10 ** (-DECADES * share.square()) * keys).float()


def longer(factors: Tensor, keys: int) -> Tensor:
    """`factors` and, above them, those that tell thresholds apart for rows of `keys` keys.

    What was measured at the last of `factors` also holds for the new ones if no row had more keys
    than that factor: lambda was 1 for each of them.
    """
    if not factors.numel():
        return trial_factors(keys)
    beyond = trial_factors(keys)
    return torch.cat((factors, beyond[beyond > factors[-1]]))
