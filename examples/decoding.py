"""A causal language model with a static KV cache, run so that torch.compile makes two graphs.

One reads prompts (and takes perplexities), one decodes. A cache that grows, prompts of several
lengths, or other keyword arguments than `.generate()` passes would each be one more graph.
"""

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache


def static_cache(model: PreTrainedModel, length: int) -> StaticCache:
    """Room for `length` tokens at batch 1. Several models of one shape may take turns with it."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=length)
    # Otherwise the first call makes the buffers, in a graph of its own.
    cache.early_initialization(
        batch_size=1,
        num_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=model.dtype,
        device=model.device,
    )
    return cache


class Decoder:
    """Runs `model` on `cache`, a prompt or a token at a time, as `.generate()` would call it."""

    def __init__(self, model: PreTrainedModel, cache: StaticCache) -> None:
        self.model = model
        self.cache = cache
        self._room = cache.layers[0].max_cache_len

    def prefill(self, ids: Tensor) -> Tensor:
        """Empties the cache and reads a prompt: [1, n] -> logits [1, n, vocabulary]."""
        self.cache.reset()
        return self._call(ids, torch.arange(ids.shape[1], device=ids.device)[None])

    def step(self, token: Tensor, position: int) -> Tensor:
        """Reads the token at `position`, the next free one: [1, 1] -> logits [1, 1, vocabulary]."""
        where = torch.tensor([[position]], device=token.device)
        seen = torch.arange(self._room, device=token.device) <= where
        return self._call(token, where, attention_mask=seen[:, None, None])

    @torch.no_grad()
    def _call(self, ids: Tensor, positions: Tensor, **mask: Tensor) -> Tensor:
        output = self.model(
            # Strides are guarded too, even those of an axis of one.
            input_ids=ids.clone(memory_format=torch.contiguous_format),
            past_key_values=self.cache,
            position_ids=positions,
            logits_to_keep=0,
            use_cache=True,
            return_dict=True,
            **mask,
        )
        logits: Tensor = output.logits
        return logits

    def generate(self, ids: Tensor, count: int) -> Tensor:
        """`count` greedy tokens after a prompt [1, n] by the model's own `.generate()`: [count]."""
        self.cache.reset()
        result = self.model.generate(
            ids.clone(memory_format=torch.contiguous_format),
            past_key_values=self.cache,
            logits_to_keep=0,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            disable_compile=True,  # on a GPU `.generate()` would compile what is compiled already
        )
        tokens: Tensor = result[0, ids.shape[1] :]
        return tokens


def seconds(decoder: Decoder, token: Tensor, position: int) -> float:
    """Wall-clock time of one decoding step."""
    start = time.perf_counter()
    decoder.step(token, position)
    wait(token.device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
