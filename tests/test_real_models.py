"""The real models compute what their makers' files compute; the real data are what they claim."""

import math

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from examples import real_models, wikipedia
from examples.real_models import MissingModelPackage, package_file, perplexity

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def smollm2() -> Loaded:
    return real_models.smollm2()


@pytest.mark.slow
def test_smollm2_knows_a_capital(smollm2: Loaded) -> None:
    model, tokenizer = smollm2
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert model.dtype == torch.float32
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])
    assert text.startswith("The capital of France is Paris")


@pytest.mark.slow
def test_perplexity_of_smollm2(smollm2: Loaded) -> None:
    model, tokenizer = smollm2
    tokens = real_models.evaluation_tokens(tokenizer)
    assert tokens.shape == (4096,)
    # Four windows: 24 spread over the middle third give 18.6, single ones 11 to 32.
    assert perplexity(model, tokens) == pytest.approx(16.8, rel=0.02)


def test_perplexity_of_a_uniform_guess_is_the_vocabulary(
    nothing: PreTrainedModel,
) -> None:
    tokens = torch.arange(24) % 7
    uniform = perplexity(nothing, tokens, 8, lambda ids: torch.zeros(1, 8, 7))
    assert uniform == pytest.approx(7, rel=1e-5)


def test_perplexity_scores_each_next_token_within_its_window(nothing: PreTrainedModel) -> None:
    tokens = torch.tensor([3, 1, 4, 1, 5, 2, 6, 5])

    def knows_all_but_the_last(ids: Tensor) -> Tensor:
        sure = torch.nn.functional.one_hot(ids.roll(-1, 1), 7) * 1e4
        sure[0, -2] = 0  # a uniform guess for the last token; the row after it must not count
        return sure.float()

    found = perplexity(nothing, tokens, 4, knows_all_but_the_last)
    assert found == pytest.approx(math.exp(math.log(7) / 3), rel=1e-5)


@pytest.fixture
def nothing() -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=7,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def test_minilm_puts_like_sentences_together() -> None:
    model, tokenizer = real_models.minilm()
    sentences = ["A cat sits on the mat.", "A kitten rests on a rug.", "Stocks fell sharply."]
    vectors = real_models.sentence_vectors(model, tokenizer, sentences)
    likeness = vectors @ vectors.T
    assert torch.allclose(likeness.diagonal(), torch.ones(3), atol=1e-5)
    assert likeness[0, 1] > 0.6 > 0.2 > likeness[0, 2]


def test_minilm_ignores_padding() -> None:
    model, tokenizer = real_models.minilm()
    alone = real_models.sentence_vectors(model, tokenizer, ["A cat."])
    longer = "A much longer sentence, so that the first one has to be padded."
    padded = real_models.sentence_vectors(model, tokenizer, ["A cat.", longer])
    assert torch.allclose(alone[0], padded[0], atol=1e-5)


def test_dinov2_equals_the_file_it_was_read_from() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 224, 224)
    session = onnxruntime.InferenceSession(
        real_models.dinov2_file(), providers=["CPUExecutionProvider"]
    )
    (expected,) = session.run(None, {"input_image": images.numpy()})
    with torch.no_grad():
        found = real_models.dinov2_small()(images)
    assert found.std() > 0.01
    assert (found - torch.from_numpy(expected)).abs().max() < 1e-4


def test_efficientnet_classifies_photographs() -> None:
    images, labels = real_models.imagenet_samples()
    assert images.shape == (20, 3, 224, 224)
    assert labels.tolist()[:3] == [243, 559, 438]
    with torch.no_grad():
        found = real_models.efficientnet_lite0()(images).argmax(1)
    assert (found == labels).sum() == 18


def test_photographs_are_scaled_and_cropped_not_stretched() -> None:
    images, _ = real_models.imagenet_samples()
    assert images.min() >= -127 / 128
    assert images.max() <= 1
    file = package_file("foolbox", "data/imagenet_00_*.jpg")
    with Image.open(file) as photo:
        scale = 256 / min(photo.size)
        middle = np.asarray(photo.convert("RGB"))
    # The mean colour of the central half is the same before and after, up to resampling.
    half = int(112 / scale)
    top, left = middle.shape[0] // 2 - half // 2, middle.shape[1] // 2 - half // 2
    before = middle[top : top + half, left : left + half].mean((0, 1))
    after = images[0, :, 56:168, 56:168].mean((1, 2)).numpy() * 128 + 127
    assert np.abs(before - after).max() < 3


def test_wikipedia_is_plain_english() -> None:
    text = real_models.wikipedia_text()
    assert 2.4e6 < len(text) < 2.7e6
    assert text.startswith("Anarchism is a political philosophy")
    for markup in ("{{", "{|", "[[", "<ref", "'''", "&quot;", "http://"):
        assert text.count(markup) <= 5, markup


@pytest.mark.parametrize(
    ("source", "plain"),
    [
        ("a {{b|{{c}} d}} e", "a e"),
        ("[[Tree|trees]] and [[leaf]]s", "trees and leafs"),
        ("[[File:x.png|thumb|A [[dog]].]]Text", "Text"),
        ("one<ref name=x>no</ref> two<ref name=x/>", "one two"),
        ("''very'' '''old'''", "very old"),
        ("{| class=x\n| cell\n{|\n| inner\n|}\n|}after", "after"),
        ("[http://a.b the site] is up", "the site is up"),
        ("== Head ==\n* item\nText", "Text"),
        ("R&amp;D <!-- no\nno --> here", "R&D here"),
    ],
)
def test_wikitext_becomes_plain(source: str, plain: str) -> None:
    assert wikipedia.plain(source) == plain


def test_a_missing_package_is_named_with_the_remedy() -> None:
    with pytest.raises(MissingModelPackage, match=r"no_such_model.*constraints/models.txt"):
        package_file("no_such_model", "weights.gguf")
    with pytest.raises(MissingModelPackage, match=r"foolbox.*without data/none"):
        package_file("foolbox", "data/none")
