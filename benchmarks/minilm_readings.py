"""all-MiniLM-L6-v2 and texts for it to read: some to calibrate with, others to judge by.

Most text is Python's language reference, which each Python carries. The topics that are read to judge are not
read to calibrate.
"""

import functools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

import nvfp4sweep_torch
from tests import minilm

Weights = dict[str, Tensor]


def split_text(held_out_tokens: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Held-out paragraphs of the language reference, and those of all other topics, shuffled."""
    seen: set[str] = set()
    by_topic = []
    for _, text in sorted(topics.items()):
        new = [paragraph for paragraph in _paragraphs(text) if paragraph not in seen]
        seen.update(new)  # topics repeat each other
        by_topic.append(new)
    random.Random(0).shuffle(by_topic)
    held_out: list[str] = []
    while count_tokens(held_out) < held_out_tokens:
        held_out += by_topic.pop()
    others = [paragraph for topic in by_topic for paragraph in topic]
    random.Random(1).shuffle(others)
    return tuple(held_out), tuple(others)


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of prose: no code, no grammar, no headings."""
    for part in text.split("\n\n"):
        paragraph = " ".join(part.split())
        is_prose = re.fullmatch(r"[A-Z].*[.:]", paragraph) and len(paragraph.split()) >= 8
        if is_prose and not part.startswith(" ") and "::=" not in part:
            yield paragraph


def disjoint_draws(sentences: Sequence[str], tokens: int, most: int) -> list[tuple[str, ...]]:
    """Up to `most` runs of sentences, each the shortest that has so many tokens."""
    draws: list[tuple[str, ...]] = []
    drawn: list[str] = []
    count = 0
    for sentence in sentences:
        drawn.append(sentence)
        count += len(minilm.token_ids(sentence))
        if count >= tokens:
            draws.append(tuple(drawn))
            drawn, count = [], 0
    return draws[:most]


def count_tokens(sentences: Sequence[str]) -> int:
    return sum(len(minilm.token_ids(sentence)) for sentence in sentences)


@functools.cache
def linear_weights() -> Weights:
    """Copies of the weights of all linear layers, by their names in state_dict."""
    layers = minilm.model().named_modules()
    return {
        f"{name}.weight": layer.weight.detach().clone()
        for name, layer in layers
        if isinstance(layer, torch.nn.Linear)
    }


@dataclass(frozen=True)
class Reading:
    """What the full-precision model computes from some sentences.

    Attributes:
        sentences: what it read.
        tokens: how many there are.
        moments: the second moments of each layer's inputs in blocks of 16, to calibrate with.
        grams: float32 [K, K], the sum of x x^T over each layer's inputs x, to judge with.
        outputs: the squared norm of each layer's outputs, without bias.
        embeddings: float64 [sentences, 384].
    """

    sentences: tuple[str, ...]
    tokens: int
    moments: dict[str, nvfp4sweep_torch.HessianAccumulator]
    grams: dict[str, Tensor]
    outputs: dict[str, float]
    embeddings: Tensor


def read(sentences: tuple[str, ...]) -> Reading:
    model = minilm.model()
    sums = {}
    hooks = []
    for name, weight in linear_weights().items():
        sums[name] = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
        layer = model.get_submodule(name.removesuffix(".weight"))
        hooks.append(layer.register_forward_pre_hook(_adding_to(sums[name])))
    with nvfp4sweep_torch.accumulate_hessians(model) as moments:
        embeddings = embed(sentences)
    for hook in hooks:
        hook.remove()
    grams = {name: total.float() for name, total in sums.items()}
    outputs = {name: output_norm(weight, grams[name]) for name, weight in linear_weights().items()}
    return Reading(sentences, count_tokens(sentences), moments, grams, outputs, embeddings)


def output_norm(weight: Tensor, gram: Tensor) -> float:
    """||X W^T||^2 from X^T X, which is all that it depends on."""
    return float(((weight @ gram) * weight).sum(dtype=torch.float64))


def _adding_to(gram: Tensor) -> Callable[[Any, Any], None]:
    def hook(layer: Any, inputs: Any) -> None:
        x = inputs[0].flatten(0, -2).double()
        gram.addmm_(x.mT, x)

    return hook


def embed(sentences: tuple[str, ...]) -> Tensor:
    """The sentences' embeddings as the model's authors define them: means over the tokens, of length 1."""
    with torch.no_grad():
        means = [minilm.model()(**batch).last_hidden_state.mean(1) for batch in minilm.batches(sentences)]
    return torch.nn.functional.normalize(torch.cat(means).double(), dim=1)


@contextmanager
def replaced(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """In the block the model has these weights."""
    _assign(weights)
    try:
        yield
    finally:
        _assign(linear_weights())


def _assign(weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        minilm.model().get_parameter(name).data.copy_(weight)
