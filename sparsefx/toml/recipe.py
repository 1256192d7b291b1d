"""A recipe as TOML: [[weights]] and [[attention]], an entry for each glob, and [allocation].

    [[weights]]                        [[attention]]                       [allocation]
    match = "*.mlp.*"                  match = "*.layers.1?.self_attn"     method = "owl"
    pattern = "nm"                     method = "skip_softmax"
    n = 2                              sparsity = 0.7
    m = 4                              tile = [64, 64]
    criterion = "wanda"

A plain [attention] table, without match, is for every attention. `permute = true`, before all
tables, lets input channels of N:M weights change places.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path

import tomli_w

from sparsefx.allocations import Allocation
from sparsefx.attention.spec import AttentionPattern
from sparsefx.patterns import Pattern
from sparsefx.toml.allocation import allocation_entry, parse_allocation
from sparsefx.toml.attention import attention_entry, parse_attention
from sparsefx.toml.pattern import parse_pattern, pattern_entry
from sparsefx.toml.values import invalid

Weights = Mapping[str, Pattern | None]
Attention = AttentionPattern | Mapping[str, AttentionPattern | None] | None


def dumps(
    weights: Weights, attention: Attention, allocation: Allocation | None, permute: bool
) -> str:
    """The text that `loads` reads. Raises InvalidRecipe for a metric, which is no data."""
    table: dict[str, object] = {"permute": True} if permute else {}
    if isinstance(attention, Mapping):
        table["attention"] = [
            {"match": glob, **attention_entry(p)} for glob, p in attention.items()
        ]
    elif attention is not None:
        table["attention"] = attention_entry(attention)
    if allocation is not None:
        table["allocation"] = allocation_entry(allocation)
    table["weights"] = [
        {"match": glob, **pattern_entry(pattern)} for glob, pattern in weights.items()
    ]
    return tomli_w.dumps(table)


def loads(
    content: bytes, path: str | Path
) -> tuple[dict[str, Pattern | None], Attention, Allocation | None, bool]:
    """Weights, attention, allocation and permute of a recipe; `path` is named in errors.

    Raises InvalidRecipe, and InvalidPattern for a pattern whose numbers make no sense.
    """
    try:
        table = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # tomllib on bad syntax, UTF-8, digits, depth
        raise invalid(path, f"not TOML: {error}") from error
    known = ("weights", "attention", "allocation", "permute")
    for section in table:
        if section not in known:
            raise invalid(path, f"unknown section {section!r}, known: {', '.join(known)}")
    entries = _entries(path, "weights", table.get("weights", []))
    weights = {glob: parse_pattern(path, entry) for glob, entry in entries.items()}
    allocation = table.get("allocation")
    spread = None if allocation is None else parse_allocation(path, allocation)
    permute = table.get("permute", False)
    if not isinstance(permute, bool):
        raise invalid(path, f"permute = {permute!r} must be true or false")
    return weights, _attention(path, table.get("attention")), spread, permute


def _attention(path: str | Path, given: object) -> Attention:
    if given is None:
        return None
    if isinstance(given, dict):
        return parse_attention(path, "[attention]", given)
    entries = _entries(path, "attention", given)
    return {
        glob: parse_attention(path, f"[[attention]] {glob!r}", entry)
        for glob, entry in entries.items()
    }


def _entries(path: str | Path, section: str, given: object) -> dict[str, dict[str, object]]:
    """match -> the other keys of each [[section]] entry."""
    if not isinstance(given, list):
        raise invalid(path, f"{section} must be an array of tables, [[{section}]]")
    entries: dict[str, dict[str, object]] = {}
    for entry in given:
        glob = entry.get("match") if isinstance(entry, dict) else None
        if not isinstance(glob, str):
            raise invalid(path, f"each [[{section}]] entry needs match = '<glob>'")
        if glob in entries:
            raise invalid(path, f"two [[{section}]] entries have the same match {glob!r}")
        entries[glob] = {key: value for key, value in entry.items() if key != "match"}
    return entries
