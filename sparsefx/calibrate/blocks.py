"""Which modules of a model repeat: transformer layers, stages of a CNN, the layers of an MLP.

Siblings whose names differ in a number at the end are a family: `layers.0`, `layers.1`; `layer1`,
`layer2`. The members of the outermost families are the blocks. A member that holds more than half
of the model's weights and has families inside gives way to those.
"""

import re
from collections.abc import Mapping, Sequence

_NUMBERED = re.compile(r"(.*?)\d+$")
_CALLED_AGAIN = re.compile(r"@\d+")  # how torch.export writes a module's second call


def repeated_blocks(sizes: Mapping[str, int]) -> frozenset[str]:
    """Module paths of the blocks; none holds another. sizes: parameter name -> elements."""
    return frozenset(_blocks("", sizes, sum(sizes.values())))


def block_of(path: str, blocks: frozenset[str]) -> str | None:
    """The block that a module or parameter lies in, None outside of all of them."""
    path = _CALLED_AGAIN.sub("", path)
    while path:
        if path in blocks:
            return path
        path = path.rpartition(".")[0]
    return None


def common_owner(parameters: Sequence[str]) -> str:
    """The path of the smallest module that holds all of `parameters`, "" for the whole model."""
    owners = [name.split(".")[:-1] for name in parameters]
    shared = []
    for parts in zip(*owners, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _blocks(prefix: str, sizes: Mapping[str, int], total: int) -> list[str]:
    children: dict[str, dict[str, int]] = {}
    for name, size in sizes.items():
        child, dot, _ = name.removeprefix(prefix).partition(".")
        if dot:
            children.setdefault(child, {})[name] = size
    found = []
    for child, inside in children.items():
        within = _blocks(f"{prefix}{child}.", inside, total)
        # Members that have no parameters, such as the ReLUs between, are not among the children.
        is_member = sum(_stem(other) == _stem(child) for other in children) > 1
        is_most = 2 * sum(inside.values()) > total
        if is_member and _stem(child) is not None and not (is_most and within):
            found.append(prefix + child)
        else:
            found += within
    return found


def _stem(name: str) -> str | None:
    """ "layer1" -> "layer", "0" -> "", "lm_head" -> None."""
    numbered = _NUMBERED.match(name)
    return numbered[1] if numbered else None
