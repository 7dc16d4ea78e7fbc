"""Exact NVFP4 block scales: for every 16 weights the E4M3 scale of least squared error.

The functions here take NumPy arrays. nvfp4sweep_torch and nvfp4sweep_jax have the same functions for
tensors and arrays of their framework.
"""

from nvfp4sweep.api import Sweep, calibrate, global_amax, quantize, sweep
from nvfp4sweep.formats import scale_candidates
from nvfp4sweep.objectives import ZeroHessianWarning
from nvfp4sweep.packing import QuantizedTensor

__version__ = "0.1.0"

__all__ = [
    "QuantizedTensor",
    "Sweep",
    "ZeroHessianWarning",
    "calibrate",
    "global_amax",
    "quantize",
    "scale_candidates",
    "sweep",
]
