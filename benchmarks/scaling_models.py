"""The models whose quantization is simulated, as shards."""

from collections.abc import Iterable

from benchmarks.checkpoint_model import LLAMA_70B, matrices, shards
from benchmarks.scaling import Shard, Tensor
from nvfp4sweep.checkpoint.selection import SHARD_BYTES


def benchmark_model(layers: int) -> list[Shard]:
    """What benchmarks.checkpoint quantizes."""
    return [
        tuple(Tensor(n_bytes, "_proj" in name) for name, n_bytes in shard.items()) for shard in shards(layers)
    ]


def _files(tensors: Iterable[Tensor]) -> list[Shard]:
    """Shards of at most SHARD_BYTES, in the order of the tensors."""
    files: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(t.n_bytes for t in files[-1]) + tensor.n_bytes > SHARD_BYTES:
            files.append([])
        files[-1].append(tensor)
    return [tuple(file) for file in files]


def _matrix(rows: int, columns: int, *, of: int = 1, quantized: bool = True) -> Tensor:
    return Tensor(2 * rows * columns * of, quantized)


def _llama_70b() -> list[Shard]:
    """Llama 3 70B; what is small beside its matrices is left out."""
    layer = [_matrix(*shape) for shape in matrices(LLAMA_70B)]
    embedding = _matrix(LLAMA_70B.vocabulary, LLAMA_70B.hidden, quantized=False)
    return _files([embedding, *layer * 80, embedding])


def _experts_1t() -> list[Shard]:
    """The experts and the vocabulary of Kimi K2; what is small beside them is left out."""
    hidden, intermediate, experts, layers, vocabulary, together = 7168, 2048, 384, 60, 163840, 16
    layer = [_matrix(intermediate, hidden, of=together)] * (3 * experts // together)
    embedding = _matrix(vocabulary, hidden, quantized=False)
    return _files([embedding, *layer * layers, embedding])


MODELS = {"70B": _llama_70b, "1T": _experts_1t}
