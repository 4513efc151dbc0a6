"""Schemes compute in float32 whatever the dtype of the model; in this mode they compute in float64."""

import torch
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """Every step to float32 goes to float64 instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        double = {torch.float32: torch.float64}
        args = [double.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: double.get(a, a) if isinstance(a, torch.dtype) else a for k, a in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)
