"""Dotted tensor attributes of a graph module: "model.layers.0.mlp.up_proj.weight"."""

from torch import Tensor, nn


def get_tensor(module: nn.Module, name: str) -> Tensor:
    """The tensor at a dotted name. Raises AttributeError if there is none."""
    owner, leaf = name.rpartition(".")[0], name.rpartition(".")[2]
    value = getattr(module.get_submodule(owner), leaf)
    if not isinstance(value, Tensor):
        raise AttributeError(f"{name} is a {type(value).__name__}, not a tensor")
    return value


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Sets the tensor at a dotted name, as a parameter if it is one, else as a buffer.

    Missing modules on the way are made, as empty `nn.Module`s.
    """
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if isinstance(value, nn.Parameter):
        module._buffers.pop(leaf, None)
        module.register_parameter(leaf, value)
    else:
        module._parameters.pop(leaf, None)
        module._buffers.pop(leaf, None)
        module.register_buffer(leaf, value)


def is_graph(module: nn.Module, name: str) -> bool:
    """Whether a dotted name is a submodule: the body of a branch, not a tensor."""
    owner, _, leaf = name.rpartition(".")
    return isinstance(module.get_submodule(owner)._modules.get(leaf), nn.Module)


def remove_unused(module: nn.Module, used: set[str]) -> None:
    """Drops every parameter and buffer whose dotted name is not in `used`, nor inside of one."""
    bodies = tuple(f"{name}." for name in used if is_graph(module, name))
    tensors = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    for name, _ in tensors:
        if name not in used and not name.startswith(bodies):
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)


def count_nonfinite(tensor: Tensor) -> int:
    """How many elements are NaN or infinite."""
    return tensor.numel() - int(tensor.detach().isfinite().sum())
