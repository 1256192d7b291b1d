"""Reads the control flow of PTX: which instructions of a loop an iteration may branch around."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_LABEL = re.compile(r"\s*(\$L\w+):")
_BRANCH = re.compile(r"\s*(@!?%p\d+\s+)?bra(?:\.uni)?\s+(\$L\w+);")
_END = re.compile(r"\s*(?:ret|exit|trap);")


@dataclass
class _Block:
    """Instructions without a branch among them; `after` are the blocks that may follow."""

    lines: list[str] = field(default_factory=list)
    after: set[int] = field(default_factory=set)


def loops(text: str) -> tuple[list[str], list[str]]:
    """The lines inside loops, and those of them that an iteration may branch around.

    A block is avoidable if the header of its innermost loop reaches itself again without it.
    """
    blocks = _blocks(text)
    innermost: dict[int, tuple[int, set[int]]] = {}
    for header, body in sorted(_loops(blocks), key=lambda loop: len(loop[1]), reverse=True):
        innermost.update((block, (header, body)) for block in body)
    looped, avoidable = [], []
    for index, (header, body) in innermost.items():
        looped += blocks[index].lines
        around = _reachable(blocks, header, body - {index})
        if index != header and any(header in blocks[block].after for block in around):
            avoidable += blocks[index].lines
    return looped, avoidable


def _blocks(text: str) -> list[_Block]:
    blocks, starts, jumps = [_Block()], {}, []
    falls = True  # whether the current block may run on into the next
    for line in text.splitlines():
        label, branch = _LABEL.match(line), _BRANCH.match(line)
        if label:
            falls = _next(blocks, falls)
            starts[label[1]] = len(blocks) - 1
            continue
        blocks[-1].lines.append(line)
        if branch:
            jumps.append((len(blocks) - 1, branch[2]))
        if branch or _END.match(line):
            falls = _next(blocks, branch is not None and branch[1] is not None)
    for block, target in jumps:
        blocks[block].after.add(starts[target])
    return blocks


def _next(blocks: list[_Block], falls: bool) -> bool:
    """Begins a block; True, because what comes next may run on."""
    if falls:
        blocks[-1].after.add(len(blocks))
    blocks.append(_Block())
    return True


def _loops(blocks: list[_Block]) -> Iterator[tuple[int, set[int]]]:
    """Header and body of each loop: a jump from a block to one that every way to it passes."""
    everywhere = set(range(len(blocks)))
    live = _reachable(blocks, 0, everywhere)
    before = {i: {each for each in live if i in blocks[each].after} for i in everywhere}
    for header in live:
        without = _reachable(blocks, 0, everywhere - {header}) if header else set()
        tails = before[header] - without
        body, pending = {header}, list(tails)
        while pending:
            block = pending.pop()
            if block not in body:
                body.add(block)
                pending.extend(before[block])
        if tails:
            yield header, body


def _reachable(blocks: list[_Block], start: int, within: set[int]) -> set[int]:
    found, pending = {start}, [start]
    while pending:
        fresh = (blocks[pending.pop()].after & within) - found
        found |= fresh
        pending.extend(fresh)
    return found
