"""The processes that torchrun has started, for checkpoint.ranks."""

import os
from datetime import timedelta
from typing import Any

from nvfp4sweep.checkpoint.ranks import ALONE, Ranks
from nvfp4sweep.checkpoint.reader import CheckpointError
from nvfp4sweep.cli_common import require

# Ranks wait for each other's passes. One that has ended is noticed at once, whatever the limit.
_LONGEST_WAIT = timedelta(days=2)


def ranks_of_environment() -> Ranks:
    """Of torchrun's variables; alone without them."""
    return _TorchRanks() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ALONE


def device_of_rank(devices: list[str], ranks: Ranks) -> list[str]:
    """One of these for each process of a machine, all of them for one that is alone."""
    if ranks.size == 1:
        return devices
    return [devices[int(os.environ.get("LOCAL_RANK", "0")) % len(devices)]]


class _TorchRanks:
    def __init__(self) -> None:
        self._distributed = require("torch.distributed", "torchrun")
        self._distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
        self.rank: int = self._distributed.get_rank()
        self.size: int = self._distributed.get_world_size()

    def gather(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        try:
            self._distributed.all_gather_object(found, mine)
        except RuntimeError as error:
            raise CheckpointError(
                "another rank has ended, and what it printed tells why; the same command goes on from here "
                f"({error})"
            ) from None
        return found
