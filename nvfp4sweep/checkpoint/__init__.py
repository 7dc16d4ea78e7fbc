"""Safetensors checkpoints: which tensors are linear weights, and what exact scales save on them.

The way of the data: `reader` lists and reads tensors, `plan` chooses the linear weights and the
groups that share a global amax, `baselines` gives the errors of the usual scales, `report` makes
rows, a table and a CSV file of them, `plot` a picture.
"""
