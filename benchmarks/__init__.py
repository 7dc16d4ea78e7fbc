"""Measurements. `python -m benchmarks.cpu` and `python -m benchmarks.cuda` append to ledger.jsonl."""
