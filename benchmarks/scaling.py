"""A simulation of `nvfp4sweep quantize`: its steps, who waits for whom, and what they share.

Each step of a tensor takes its bytes divided by a rate that benchmarks.checkpoint measured. Processes of a
host share its disk, which reads a tensor or takes a file, one at a time; each has its own cores and devices,
which take one tensor at a time too. So the simulation says how steps overlap and queue, and nothing about
what a rate becomes under load.
"""

import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import simpy

from nvfp4sweep.checkpoint.passes import AMAX, QUANTIZE, by_turns
from nvfp4sweep.checkpoint.pipeline import READERS
from nvfp4sweep.checkpoint.ranks import shares

# Of a 16-bit weight's bytes what is written: four bits an element, and a byte for 16 of them.
_PACKED_SHARE = (4 + 8 / 16) / 16


class Tensor(NamedTuple):
    """Of 16-bit elements; if it is not quantized it is copied."""

    n_bytes: int
    quantized: bool

    @property
    def written(self) -> float:
        """Bytes."""
        return self.n_bytes * (_PACKED_SHARE if self.quantized else 1)


Shard = tuple[Tensor, ...]
_Events = Generator[Any, Any, None]


class _Weight(NamedTuple):
    """A tensor that is quantized, and what happens when its amax is found."""

    tensor: Tensor
    found: simpy.Event


class _Step(NamedTuple):
    stage: str
    weight: _Weight


@dataclass(frozen=True)
class Rates:
    """Bytes a second: of weights as they are stored, and for `write` and `sync` of what is written.

    Attributes:
        read, sync: of a host's disk: it reads, or takes what was written.
        read_cached: the second time, of what the host still has in memory, a thread.
        write: of a process, to memory of the system.
        amax, report: of a process: the first pass's arithmetic, and the report's.
        quantize: of a device: to it, search, pack, and back.
    """

    read: float
    read_cached: float
    amax: float
    quantize: float
    report: float
    write: float
    sync: float


@dataclass(frozen=True)
class Cluster:
    """Processes on hosts that see one file system, whose rates are those of each host.

    Attributes:
        processes: on each host.
        devices: of each process.
        skip_bad: all amaxes are found before the first shard is begun.
    """

    rates: Rates
    hosts: int = 1
    processes: int = 1
    devices: int = 1
    skip_bad: bool = False


class Spent(NamedTuple):
    """Seconds: the whole, until shards are begun, and how long the busiest resource of each kind was busy."""

    seconds: float
    before: float
    busy: dict[str, float]


class _Server:
    """What serves one at a time."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env, self._queue = env, simpy.Resource(env)
        self.busy = 0.0

    def serve(self, seconds: float) -> _Events:
        with self._queue.request() as turn:
            yield turn
            yield self._env.timeout(seconds)
        self.busy += seconds


class _Process:
    """Cores and devices, and which steps and shards are its own."""

    def __init__(
        self, env: simpy.Environment, model: Sequence[Shard], cluster: Cluster, disk: _Server
    ) -> None:
        self._env, self._model, self._cluster, self._rates = env, model, cluster, cluster.rates
        self.disk, self.cores = disk, _Server(env)
        self.devices = [_Server(env) for _ in range(cluster.devices)]
        self._idle_devices = simpy.Store(env)
        self._idle_devices.items.extend(self.devices)

    def start(self, plan: Sequence[_Step], shards: Sequence[int], workers: int) -> None:
        """Goes through the steps as pipeline.ahead does, and writes the shards as quantizer.Job does."""
        self._room = simpy.Container(self._env, init=workers)
        self._readers = simpy.Resource(self._env, READERS)
        self._workers = simpy.Resource(self._env, workers)
        steps = [(step, self._env.event()) for step in plan]
        self._env.process(self._go_ahead(steps))
        self._env.process(self._write(iter(steps), shards))

    def _go_ahead(self, steps: Sequence[tuple[_Step, simpy.Event]]) -> _Events:
        for step, done in steps:
            yield self._room.get(1)
            self._env.process(self._compute(step, self._env.process(self._read(step)), done))

    def _read(self, step: _Step) -> _Events:
        # After a first pass of its own, most of what a host reads is what others have read before.
        in_memory = not self._cluster.skip_bad or self._cluster.hosts == 1
        with self._readers.request() as turn:
            yield turn
            if step.stage == QUANTIZE and in_memory:
                yield self._env.timeout(step.weight.tensor.n_bytes / self._rates.read_cached)
            else:
                yield from self.disk.serve(step.weight.tensor.n_bytes / self._rates.read)

    def _compute(self, step: _Step, coming: simpy.Event, done: simpy.Event) -> _Events:
        n_bytes = step.weight.tensor.n_bytes
        with self._workers.request() as turn:
            yield turn
            yield coming
            if step.stage == AMAX:
                yield from self.cores.serve(n_bytes / self._rates.amax)
                step.weight.found.succeed()
            else:
                yield step.weight.found
                device = yield self._idle_devices.get()
                yield from device.serve(n_bytes / self._rates.quantize)
                yield self._idle_devices.put(device)
                yield from self.cores.serve(n_bytes / self._rates.report)
        done.succeed()

    def _write(self, steps: Iterator[tuple[_Step, simpy.Event]], shards: Sequence[int]) -> _Events:
        finished: simpy.Event = self._env.timeout(0)
        for i in shards:
            left = sum(tensor.quantized for tensor in self._model[i])
            while left:
                step, done = next(steps)
                yield from self._take(done)
                if step.stage == QUANTIZE:
                    yield self._env.timeout(step.weight.tensor.written / self._rates.write)
                    left -= 1
            yield finished
            finished = self._env.process(self._finish(self._model[i]))
        for _, done in steps:  # where nothing is written yet
            yield from self._take(done)
        yield finished

    def _take(self, done: simpy.Event) -> _Events:
        """A result; whoever asks for it makes room for another step."""
        yield self._room.put(1)
        yield done

    def _finish(self, shard: Shard) -> _Events:
        for tensor in shard:
            if not tensor.quantized:
                yield from self.disk.serve(tensor.n_bytes / self._rates.read)
                yield self._env.timeout(tensor.written / self._rates.write)
        yield from self.disk.serve(sum(tensor.written for tensor in shard) / self._rates.sync)


def shards_of_each(model: Sequence[Shard], processes: int) -> list[list[int]]:
    """Which are each process's, as checkpoint.quantizer shares them."""
    n_bytes = [sum(tensor.n_bytes for tensor in shard) for shard in model]
    return shares(range(len(model)), n_bytes.__getitem__, processes)


def simulate(model: Sequence[Shard], cluster: Cluster) -> Spent:
    """Quantize the shards of a model."""
    env = simpy.Environment()
    disks = [_Server(env) for _ in range(cluster.hosts)]
    processes = [_Process(env, model, cluster, disk) for disk in disks for _ in range(cluster.processes)]
    weights = [[_Weight(tensor, env.event()) for tensor in shard if tensor.quantized] for shard in model]
    if cluster.skip_bad:
        of_each = shares([*chain(*weights)], lambda weight: weight.tensor.n_bytes, len(processes))
        for process, mine in zip(processes, of_each, strict=True):
            process.start([_Step(AMAX, weight) for weight in mine], [], 1)
        env.run()
    before = env.now
    for process, shards in zip(processes, shards_of_each(model, len(processes)), strict=True):
        plan = [_Step(*step) for step in by_turns([weights[i] for i in shards])]
        if cluster.skip_bad:
            plan = [step for step in plan if step.stage == QUANTIZE]
        process.start(plan, shards, 2 * cluster.devices)
    env.run()
    busy = {
        "disk": max(disk.busy for disk in disks),
        "cores": max(process.cores.busy for process in processes),
        "device": max(device.busy for process in processes for device in process.devices),
    }
    return Spent(env.now, before, busy)


def faster(rates: Rates, names: Iterable[str], times: float) -> Rates:
    """These rates so many times as high."""
    return dataclasses.replace(rates, **{name: times * getattr(rates, name) for name in names})
