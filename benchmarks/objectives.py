"""What each objective does to the output error of a real model's layers.

python -m benchmarks.objectives [ledger]

Scales are found with the activations of some text and judged with those of other text, of the same kind
("held_out") and of another kind ("everyday"). Output errors are those of one layer alone, with its inputs
in full precision. Cosines are between embeddings, with all layers quantized.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import nvfp4sweep
import nvfp4sweep_torch
from benchmarks import gate, ledger
from benchmarks.minilm_readings import (
    Reading,
    Weights,
    disjoint_draws,
    embed,
    linear_weights,
    output_norm,
    read,
    replaced,
    split_text,
)
from nvfp4sweep import formats, packing
from nvfp4sweep.checkpoint import baselines
from nvfp4sweep.checkpoint.plan import fusion_groups
from nvfp4sweep_torch import HessianAccumulator
from tests import minilm

HELD_OUT_TOKENS = 8192
CALIBRATION_TOKENS = (64, 512, 4096, 16384)
#: Calibrations of each size, as far as the text goes.
MOST_DRAWS = 3
#: What the oracle checks: all rows would take it minutes.
GATE_ROWS = slice(None, None, 16)


def halved(hessian: Tensor) -> Tensor:
    """Half of what is off the diagonals: the mean of the Hessian's objective and the importance's."""
    return (hessian + torch.diag_embed(hessian.diagonal(dim1=-2, dim2=-1))) / 2


#: What each objective asks of nvfp4sweep, given a layer's activations.
OBJECTIVES: dict[str, Callable[[HessianAccumulator], dict[str, Any]]] = {
    "plain": lambda moments: {},
    "root_importance": lambda moments: {"importance": moments.importance().sqrt()},
    "importance": lambda moments: {"importance": moments.importance()},
    "half_hessian": lambda moments: {"hessian": halved(moments.hessian())},
    "hessian": lambda moments: {"hessian": moments.hessian()},
}


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ledger.PATH
    torch.set_num_threads(1)  # the layers are small: threads would wait for each other on a busy machine
    held_out, pool = split_text(HELD_OUT_TOKENS)
    judges = {"held_out": read(held_out), "everyday": read(minilm.SENTENCES)}
    plain = quantized("plain", judges["held_out"])  # whatever was read
    plain_errors = {text: output_errors(plain, reading) for text, reading in judges.items()}
    sizes = []
    for tokens in CALIBRATION_TOKENS:
        calibrations = [read(sentences) for sentences in disjoint_draws(pool, tokens, MOST_DRAWS)]
        draws = []
        for calibration in calibrations:
            plain_errors["calibration"] = output_errors(plain, calibration)
            draws.append(_over_plain(plain_errors, {"calibration": calibration, **judges}))
        sizes.append({"tokens": [calibration.tokens for calibration in calibrations], "draws": draws})
    largest = calibrations[0]
    entry = {
        "benchmark": "objectives",
        "model": "all-MiniLM-L6-v2",
        "blocks_equal_to_oracle": {objective: _check(objective, largest) for objective in OBJECTIVES},
        **_by_layer({"calibration": largest, **judges}),
        "sizes": sizes,
    }
    ledger.append({**ledger.environment(ledger.processor()), **entry}, path)


def _over_plain(
    plain_errors: Mapping[str, npt.NDArray[np.float64]], readings: Mapping[str, Reading]
) -> dict[str, dict[str, float]]:
    """By objective: output errors over the plain ones, in the geometric mean over the layers.

    And on how many layers they are larger. Scales are found by readings["calibration"].
    """
    found = {}
    for objective in OBJECTIVES:
        if objective == "plain":
            continue
        weights = quantized(objective, readings["calibration"])
        row = {"cosine": cosines(weights, readings["held_out"])["mean"]}
        for text, reading in readings.items():
            ratios = output_errors(weights, reading) / plain_errors[text]
            row[text] = _rounded(np.exp(np.log(ratios).mean()))
            row[f"{text}_worse"] = int((ratios > 1).sum())
        found[objective] = row
    return found


def _by_layer(readings: Mapping[str, Reading]) -> dict[str, Any]:
    """Everything about each layer, with scales found by readings["calibration"]."""
    calibration = readings["calibration"]
    weights = {"absmax": {name: absmax(name) for name in linear_weights()}}
    weights |= {objective: quantized(objective, calibration) for objective in OBJECTIVES}
    return {
        "text": {
            text: {"sentences": len(reading.sentences), "tokens": reading.tokens}
            for text, reading in readings.items()
        },
        "layers": {
            name.removesuffix(".weight"): list(weight.shape) for name, weight in linear_weights().items()
        },
        "squared_error": {scales: _list(squared_errors(values)) for scales, values in weights.items()},
        "output_error": {
            text: {scales: _list(output_errors(values, reading)) for scales, values in weights.items()}
            for text, reading in readings.items()
        },
        "cosine": {
            text: {scales: cosines(values, readings[text]) for scales, values in weights.items()}
            for text in readings
            if text != "calibration"
        },
    }


# --- scales ---------------------------------------------------------------------------------------


@functools.cache
def global_amaxes() -> dict[str, Tensor]:
    """The global amax of each weight; q, k and v of a layer share theirs, as at inference."""
    weights = linear_weights()
    amaxes = {name: nvfp4sweep_torch.global_amax(weight) for name, weight in weights.items()}
    for group in fusion_groups(weights):
        amaxes |= dict.fromkeys(group, nvfp4sweep_torch.global_amax(*(weights[name] for name in group)))
    return amaxes


def absmax(name: str) -> Tensor:
    """A weight as NVFP4 stores it with the scales that take each block's maximum to 6."""
    weight, amax = linear_weights()[name].numpy(), global_amaxes()[name].numpy()
    blocks = weight.reshape(len(weight), -1, formats.BLOCK_SIZE)
    code = baselines.absmax_code(np.abs(blocks).max(axis=-1), np.float32(amax))
    scale = np.repeat(formats.scale_by_code(amax)[code], formats.BLOCK_SIZE, axis=1)
    stored = nvfp4sweep.QuantizedTensor(
        packed=packing.pack(packing.encode(weight, scale), axis=1),
        scale=packing.scale_bytes(code),
        global_scale=packing.global_scale(amax),
        axis=1,
        block_size=formats.BLOCK_SIZE,
    )
    return torch.from_numpy(stored.dequantize())


def quantized(objective: str, calibration: Reading) -> Weights:
    """All weights as NVFP4 stores them with the best scales for an objective."""
    return {
        name: nvfp4sweep_torch.quantize(weight, **_options(objective, name, calibration)).dequantize()
        for name, weight in linear_weights().items()
    }


def _options(objective: str, name: str, calibration: Reading) -> dict[str, Any]:
    return {"global_amax": global_amaxes()[name], **OBJECTIVES[objective](calibration.moments[name])}


def _check(objective: str, calibration: Reading) -> int:
    """How many blocks were compared with the oracle; SystemExit if one differs."""
    compared = 0
    for name, weight in linear_weights().items():
        options = _options(objective, name, calibration)
        code = nvfp4sweep_torch.sweep(weight, **options).code[GATE_ROWS]
        expected = nvfp4sweep_torch.sweep(weight[GATE_ROWS], **options, implementation="oracle").code
        compared += gate.require_equal(f"{objective} {name}", code.numpy(), expected.numpy())
    return compared


# --- what they do ---------------------------------------------------------------------------------


def squared_errors(weights: Weights) -> npt.NDArray[np.float64]:
    exact = linear_weights()
    return np.array([float((exact[n].double() - weights[n].double()).square().sum()) for n in exact])


def output_errors(weights: Weights, reading: Reading) -> npt.NDArray[np.float64]:
    """||X (W - Q)^T||^2 / ||X W^T||^2 of each layer."""
    errors = {n: output_norm(w - weights[n], reading.grams[n]) for n, w in linear_weights().items()}
    return np.array([error / reading.outputs[name] for name, error in errors.items()])


def cosines(weights: Weights, reading: Reading) -> dict[str, float]:
    """Between the sentences' embeddings in full precision and those with these weights."""
    with replaced(weights):
        cosine = (embed(reading.sentences) * reading.embeddings).sum(dim=1)
    return {"mean": round(float(cosine.mean()), 6), "min": round(float(cosine.min()), 6)}


def _list(values: npt.NDArray[np.float64]) -> list[float]:
    return [_rounded(value) for value in values]


def _rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
