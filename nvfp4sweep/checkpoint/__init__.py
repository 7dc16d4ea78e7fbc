"""Safetensors checkpoints: NVFP4 ones made and checked, and what exact scales save on a model's weights.

The way of the data: `reader` lists and reads tensors, `plan` chooses the linear weights and the groups that
share a global amax. From there `quantizer` goes on with `layouts`, `writer` and `folders` to a checkpoint,
which `verifier` checks; and `baselines` with the errors of the usual scales to `report`'s rows, and `plot`.
"""
