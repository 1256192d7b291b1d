"""The pieces that bodies of sparse attention are put together from, in ONNX's textual syntax.

Values: s, scores [batch, heads, queries, keys], -inf where unseen; maxima, the largest score of
each row in each tile [.., queries, tiles]; p, probabilities like s. For one query whose heads share
K, s is [batch, kv_heads, group, keys]. `meaning.py` and `interpolate.py` hold the algebra.
"""

import re
from collections.abc import Sequence

# Each is written once, before a body that names it; later ones may name earlier ones.
SHARED = {
    "never": "Constant <value = float {-inf}> ()",
    "zero": "Constant <value = float {0}> ()",
    "one": "Constant <value = float {1}> ()",
    "vote_to_skip": "Constant <value = uint8 {1}> ()",
    "int_0": "Constant <value = int64 {0}> ()",
    "int_1": "Constant <value = int64 {1}> ()",
    "only_0": "Constant <value = int64[1] {0}> ()",
    "only_1": "Constant <value = int64[1] {1}> ()",
    "only_2": "Constant <value = int64[1] {2}> ()",
    "only_3": "Constant <value = int64[1] {3}> ()",
    "last": "Constant <value = int64[1] {-1}> ()",
    "last_but_one": "Constant <value = int64[1] {-2}> ()",
    "same_2": "Constant <value = int64[2] {0, 0}> ()",
    "same_3": "Constant <value = int64[3] {0, 0, 0}> ()",
    "heads_first": "Constant <value = int64[3] {-1, 1, 1}> ()",
    "block_q": "Constant <value_int: int = @block_q> ()",
    "block_k": "Constant <value_int: int = @block_k> ()",
    "only_block_q": "Unsqueeze (block_q, only_0)",
    "only_block_k": "Unsqueeze (block_k, only_0)",
    "batch": "Shape <start = 0, end = 1> (q)",
    "heads": "Shape <start = 1, end = 2> (q)",
    "rows": "Shape <start = 0, end = 3> (q)",
    "queries": "Shape <start = 2, end = 3> (q)",
    "width": "Shape <start = 3> (q)",
    "kv_rows": "Shape <start = 0, end = 2> (k)",
    "kv_heads": "Shape <start = 1, end = 2> (k)",
    "keys": "Shape <start = 2, end = 3> (k)",
    "v_width": "Shape <start = 3> (v)",
    "by_width": "Concat <axis = 0> (kv_rows, last, width)",
    "by_group": "Concat <axis = 0> (kv_rows, last, keys)",
    "s_size": "Concat <axis = 0> (rows, keys)",
    "y_size": "Concat <axis = 0> (rows, v_width)",
    "groups_first": "Concat <axis = 0> (kv_heads, last, only_1)",
    "query_count": "Squeeze (queries)",
    "key_count": "Squeeze (keys)",
    "query": "Range (int_0, query_count, int_1)",
    "key": "Range (int_0, key_count, int_1)",
    "tile_of_query": "Div (query, block_q)",
    "tile_of_key": "Div (key, block_k)",
    "missing_queries": "Sub (key_count, query_count)",
    "query_place": "Add (query, missing_queries)",
    "place": "Unsqueeze (query_place, last)",
    "window": "Constant <value_int: int = @window> ()",
    "oldest": "Sub (place, window)",
    "is_behind": "LessOrEqual (key, place)",
    "is_near": "Greater (key, oldest)",
    "is_one_query": "Equal (queries, only_1)",
    "factor": "Where (is_one_query, decode, prefill)",
    "scale": "Constant <value_float: float = @scale> ()",
}

PRODUCT = """
  k_columns = Transpose <perm = [0, 1, 3, 2]> ({k})
  s_raw = MatMul ({q}, k_columns)"""

# The query heads that share K stand as more rows of one head.
FOLDED_PRODUCT = """
  k_columns = Transpose <perm = [0, 1, 3, 2]> ({k})
  q_folded = Reshape ({q}, by_width)
  s_folded = MatMul (q_folded, k_columns)
  s_raw = Reshape (s_folded, s_size)"""

TIMES_V = "{y} = MatMul ({x}, {v})"

FOLDED_TIMES_V = """
  {y}_rows = Reshape ({x}, by_group)
  {y}_folded = MatMul ({y}_rows, {v})
  {y} = Reshape ({y}_folded, y_size)"""

TILE_MAXIMA = """
  key_excess = Neg (keys)
  key_gap = Mod (key_excess, block_k)
  key_pads = Concat <axis = 0> (only_0, key_gap)
  s_padded = Pad (s, key_pads, never, last)
  by_tile = Concat <axis = 0> (same_3, last, only_block_k)
  s_tiles = Reshape (s_padded, by_tile)
  maxima = ReduceMax <keepdims = 0> (s_tiles, last)
  tiles = Shape <start = 3> (maxima)
  tile_count = Squeeze (tiles)
  tile = Range (int_0, tile_count, int_1)"""

# When each tile is visited. (-j) mod tiles counts 0, last, last - 1, ..., 1.
VISITS = {
    "ascending": "visit = Identity (tile)",
    "sink_diagonal": "backwards = Neg (tile)\n  visit = Mod (backwards, tile_count)",
}

# ONNX has no running maximum: one over [.., tiles, tiles] in which tiles not yet met are -inf.
RUNNING_MAXIMA = """
  own_visit = Unsqueeze (visit, last)
  is_met = LessOrEqual (visit, own_visit)
  maxima_of_all = Unsqueeze (maxima, last_but_one)
  maxima_met = Where (is_met, maxima_of_all, never)
  running = ReduceMax <keepdims = 0> (maxima_met, last)"""

SKIPPED_ROWS = """
  keys_float = Cast <to = 1> (keys)
  lambda = Div ({factor}, keys_float)
  lambda_log = Log (lambda)
  limit = Min (lambda_log, zero)
  limits = Reshape (limit, {limits_size})
  depth = Sub (maxima, running)
  is_far = Less (depth, limits)
  is_unseen = Equal (maxima, never)
  is_skipped = Or (is_far, is_unseen)"""

# A block of rows skips a tile if all its rows do.
VOTE_OF_ROWS = """
  vote = Cast <to = 2> (is_skipped)
  row_excess = Neg (queries)
  row_gap = Mod (row_excess, block_q)
  row_pads = Concat <axis = 0> (only_0, row_gap)
  vote_padded = Pad (vote, row_pads, vote_to_skip, only_2)
  by_row_tile = Concat <axis = 0> (same_2, last, only_block_q, tiles)
  vote_tiles = Reshape (vote_padded, by_row_tile)
  agreed_by_rows = ReduceMin <keepdims = 0> (vote_tiles, only_3)"""

# Of one query, the heads of a group vote together; of more, each head for itself.
VOTE_OF_HEADS = """
  row_tiles = Shape <start = 2, end = 3> (agreed_by_rows)
  group = Div (heads, kv_heads)
  voters = Where (is_one_query, group, only_1)
  by_voters = Concat <axis = 0> (batch, last, voters, row_tiles, tiles)
  head_votes = Reshape (agreed_by_rows, by_voters)
  agreed_once = ReduceMin <keepdims = 1> (head_votes, only_2)
  head_votes_size = Shape (head_votes)
  agreed_of_each = Expand (agreed_once, head_votes_size)
  map_size = Shape (agreed_by_rows)
  agreed = Reshape (agreed_of_each, map_size)"""

VOTE_OF_GROUP = """
  vote = Cast <to = 2> (is_skipped)
  agreed = ReduceMin <keepdims = 1> (vote, only_2)"""

DECIDED = "is_dropped = Cast <to = 9> ({agreed})"

# A map of tiles as a map of elements.
OVER_QUERIES = "{rows} = Gather <axis = 2> ({tiles}, tile_of_query)"
OVER_KEYS = "{elements} = Gather <axis = 3> ({rows}, tile_of_key)"

SOFTMAX = """
  top = ReduceMax <keepdims = 1> (s_kept, last)
  is_empty = Equal (top, never)
  p_or_nan = Softmax <axis = -1> (s_kept)
  p = Where (is_empty, zero, p_or_nan)"""

SEEN = """
  is_unseen = Equal (s, never)
  is_seen = Not (is_unseen)
  seen = Cast <to = 1> (is_seen)
  count = ReduceSum <keepdims = 1> (seen, last)"""

# at_lengths: `upper` counts the lengths below, held to 1 .. points - 1; `lower` is the one before.
TABLE_PLACE = """
  known = Cast <to = 1> (lengths)
  is_shorter = Less (known, count)
  shorter = Cast <to = 7> (is_shorter)
  number = ReduceSum <keepdims = 1> (shorter, last)
  points = Shape (lengths)
  end = Sub (points, only_1)
  number_from_1 = Max (number, only_1)
  upper = Min (number_from_1, end)
  upper_before = Sub (upper, only_1)
  lower = Max (upper_before, only_0)
  start = Gather (known, lower)
  stop = Gather (known, upper)
  advance = Sub (count, start)
  distance = Sub (stop, start)
  span = Max (distance, one)
  share_anywhere = Div (advance, span)
  share = Clip (share_anywhere, zero, one)
  head_count = Squeeze (heads)
  head = Range (int_0, head_count, int_1)
  head_offset = Mul (head, points)
  offset = Reshape (head_offset, heads_first)
  lower_place = Add (offset, lower)
  upper_place = Add (offset, upper)"""

TABLE_VALUE = """
  {table}_flat = Reshape ({table}, last)
  {table}_below = Gather ({table}_flat, lower_place)
  {table}_above = Gather ({table}_flat, upper_place)
  {table}_rise = Sub ({table}_above, {table}_below)
  {table}_part = Mul (share, {table}_rise)
  {table}_here = Add ({table}_below, {table}_part)"""

WEIGHT = """
  top = ReduceMax <keepdims = 1> (s, last)
  is_empty = Equal (top, never)
  floor = Where (is_empty, zero, top)
  depth = Sub (s, floor)
  weight = Exp (depth)"""

KEPT = """
  is_above = Greater ({compared}, theta_here)
  topk = Constant <value_int: int = @topk> ()
  topk_float = Cast <to = 1> (topk)
  is_short = LessOrEqual (count, topk_float)
  is_nan = IsNaN (s)
  is_exempt = Or (is_short, is_nan)
  is_wanted = Or (is_above, is_exempt)
  is_kept = And (is_seen, is_wanted)
  {kept} = Where (is_kept, {value}, zero)"""

WEIGHT_TOTAL = "{total} = ReduceSum <keepdims = 1> ({weights}, last)"

NORMALISED = """
  is_nothing = Equal (total, zero)
  divisor = Where (is_nothing, one, total)
  {p} = Div ({weights}, divisor)"""

# What stands for the dropped part of the softmax's sum, if anything was dropped.
ESTIMATE = {
    "exp_threshold": """
  theta_depth = Sub (theta_here, top)
  theta_weight = Exp (theta_depth)
  estimate = Mul (dropped_count, theta_weight)""",
    "offline": TABLE_VALUE.format(table="lost").replace("lost_here", "estimate"),
}

MISSING = """
  kept = Cast <to = 1> (is_kept)
  kept_count = ReduceSum <keepdims = 1> (kept, last)
  dropped_count = Sub (count, kept_count)
  {estimate}
  has_dropped = Greater (dropped_count, zero)
  missing = Where (has_dropped, estimate, zero)
  total = Add (kept_total, missing)"""

V_MEAN = """
  p_total = ReduceSum <keepdims = 1> (p, last)
  lost_mass = Sub (one, p_total)
  count_from_1 = Max (count, one)
  v_mean = Div (v_total, count_from_1)
  v_part = Mul (lost_mass, v_mean)
  {y} = Add (product, v_part)"""


def with_shared(lines: Sequence[str]) -> str:
    """A body: `lines` behind those of `SHARED` that they name."""
    body = "\n  ".join(line.strip() for line in lines)
    for name, expression in reversed(SHARED.items()):
        if re.search(rf"(?<![\w@]){name}\b", body):
            body = f"{name} = {expression}\n  {body}"
    return body
