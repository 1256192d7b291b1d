"""What the GPU at hand can do beyond what every GPU can; an absent one is planned for and can."""

import torch

SPARSE_TENSOR_CORES = "sparse tensor cores"
_OLDEST = (8, 0)  # compute capability


def lacks(need: str) -> str | None:
    """Why the GPU cannot serve `need` ("" or SPARSE_TENSOR_CORES), or None.

    With no GPU present a model is planned for one (targets such as "h200"), which has them.
    """
    if not need or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    if torch.version.hip is not None:
        return f"{name} has no {need}: AMD's are not programmed by mma.sp"
    if torch.cuda.get_device_capability() < _OLDEST:
        return f"{name} has no {need}, which compute capability 8.0 brought"
    return None
