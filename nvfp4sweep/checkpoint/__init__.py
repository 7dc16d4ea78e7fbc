"""Safetensors checkpoints: NVFP4 ones made, checked and changed, and what exact scales save on weights.

The way of the data: `reader` lists and reads tensors, `plan` chooses the linear weights and the groups that
share a global amax, and `selection` says with `settings` what becomes of a model. From there `quantizer` goes
on with `passes`, `pipeline`, `engines`, `ranks`, `importances`, `layouts`, `writer` and `folders` to a
checkpoint, with `quality` beside it. `verifier` checks one, and `converter` and `rescaler` change one through
`rewriter`. `baselines` has the errors of the usual scales, for `quality` and for `report`'s rows and `plot`.
"""

from nvfp4sweep.checkpoint.converter import Converted, convert_checkpoint
from nvfp4sweep.checkpoint.engines import numpy_engine
from nvfp4sweep.checkpoint.layouts import COMPRESSED_TENSORS, LAYOUTS, MODELOPT, Layout
from nvfp4sweep.checkpoint.quantizer import Written, quantize_checkpoint
from nvfp4sweep.checkpoint.ranks import Ranks
from nvfp4sweep.checkpoint.reader import CheckpointError
from nvfp4sweep.checkpoint.rescaler import Rescaled, rescale_groups
from nvfp4sweep.checkpoint.settings import Settings
from nvfp4sweep.checkpoint.verifier import Errors, Problem, Verifier

__all__ = [
    "COMPRESSED_TENSORS",
    "LAYOUTS",
    "MODELOPT",
    "CheckpointError",
    "Converted",
    "Errors",
    "Layout",
    "Problem",
    "Ranks",
    "Rescaled",
    "Settings",
    "Verifier",
    "Written",
    "convert_checkpoint",
    "numpy_engine",
    "quantize_checkpoint",
    "rescale_groups",
]
