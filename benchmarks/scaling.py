"""A simulation of `nvfp4sweep quantize`: its steps, who waits for whom, and what they share.

Each step of a tensor takes its bytes divided by a rate that benchmarks.checkpoint measured. Processes of a
host share its disk, one tensor at a time; each has its own cores and devices, which take one tensor at a time
too. So the simulation says how steps overlap and queue, and nothing about what a rate becomes under load.
"""

import dataclasses
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import simpy

from nvfp4sweep.checkpoint.passes import AMAX, QUANTIZE, by_turns
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
_Place = tuple[int, int]  # a shard, and a tensor in it
_Step = tuple[str, _Place]


@dataclass(frozen=True)
class Rates:
    """Bytes a second: of weights as they are stored, and for `write` of what is written.

    Attributes:
        read, write: of a host's disk.
        read_cached: the second time, of what the host still has in memory, a process.
        amax, report: of a process: the first pass's arithmetic, and the report's.
        quantize: of a device: to it, search, pack, and back.
    """

    read: float
    read_cached: float
    amax: float
    quantize: float
    report: float
    write: float


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

    def serve(self, seconds: float) -> Generator[Any, Any, None]:
        with self._queue.request() as turn:
            yield turn
            yield self._env.timeout(seconds)
        self.busy += seconds


class _Process:
    def __init__(self, env: simpy.Environment, devices: int) -> None:
        self.cores = _Server(env)
        self.devices = [_Server(env) for _ in range(devices)]


class _Host:
    def __init__(self, env: simpy.Environment, processes: int, devices: int) -> None:
        self.reader, self.writer = _Server(env), _Server(env)
        self.processes = [_Process(env, devices) for _ in range(processes)]


def shards_of_each(model: Sequence[Shard], processes: int) -> list[list[int]]:
    """Which are each process's, as checkpoint.quantizer shares them."""
    n_bytes = [sum(tensor.n_bytes for tensor in shard) for shard in model]
    return shares(range(len(model)), n_bytes.__getitem__, processes)


def simulate(model: Sequence[Shard], cluster: Cluster) -> Spent:
    """Quantize the shards of a model."""
    return _Run(model, cluster).spent()


class _Run:
    def __init__(self, model: Sequence[Shard], cluster: Cluster) -> None:
        self._model, self._rates, self._cluster = model, cluster.rates, cluster
        self._env = simpy.Environment()
        self._hosts = [_Host(self._env, cluster.processes, cluster.devices) for _ in range(cluster.hosts)]

    def spent(self) -> Spent:
        size = self._cluster.hosts * self._cluster.processes
        weights = [
            [(i, j) for j, tensor in enumerate(shard) if tensor.quantized]
            for i, shard in enumerate(self._model)
        ]
        if self._cluster.skip_bad:
            for rank, mine in enumerate(shares([*chain(*weights)], self._size, size)):
                self._start(rank, [(AMAX, place) for place in mine], [], 1)
            self._env.run()
        before = self._env.now
        for rank, shards in enumerate(shards_of_each(self._model, size)):
            plan = [*by_turns([weights[i] for i in shards])]
            if self._cluster.skip_bad:
                plan = [step for step in plan if step[0] == QUANTIZE]
            self._start(rank, plan, shards, 2 * self._cluster.devices)
        self._env.run()
        processes = [process for host in self._hosts for process in host.processes]
        busy = {
            "disk's reading": max(host.reader.busy for host in self._hosts),
            "disk's writing": max(host.writer.busy for host in self._hosts),
            "cores": max(process.cores.busy for process in processes),
            "device": max(device.busy for process in processes for device in process.devices),
        }
        return Spent(self._env.now, before, busy)

    def _start(self, rank: int, plan: list[_Step], shards: Sequence[int], workers: int) -> None:
        host, process = divmod(rank, self._cluster.processes)
        work = self._work(self._hosts[host], self._hosts[host].processes[process], plan, shards, workers)
        self._env.process(work)

    def _size(self, place: _Place) -> int:
        return self._model[place[0]][place[1]].n_bytes

    def _work(
        self, host: _Host, process: _Process, plan: list[_Step], shards: Sequence[int], workers: int
    ) -> Generator[Any, Any, None]:
        """Goes through the steps as pipeline.ahead does, and writes these shards."""
        rates = self._rates
        room = simpy.Container(self._env, init=workers + 1)
        busy_workers = simpy.Resource(self._env, workers)
        engines = simpy.Store(self._env)
        engines.items.extend(process.devices)
        done = {step: self._env.event() for step in plan}

        in_memory = not self._cluster.skip_bad or self._cluster.hosts == 1  # else others have read most

        def read() -> Generator[Any, Any, None]:
            for step in plan:
                yield room.get(1)
                if step[0] == QUANTIZE and in_memory:
                    yield self._env.timeout(self._size(step[1]) / rates.read_cached)
                else:
                    yield from host.reader.serve(self._size(step[1]) / rates.read)
                self._env.process(compute(step))

        def compute(step: _Step) -> Generator[Any, Any, None]:
            size = self._size(step[1])
            with busy_workers.request() as turn:
                yield turn
                if step[0] == AMAX:
                    yield from process.cores.serve(size / rates.amax)
                else:
                    engine = yield engines.get()
                    yield from engine.serve(size / rates.quantize)
                    yield engines.put(engine)
                    yield from process.cores.serve(size / rates.report)
            done[step].succeed()

        self._env.process(read())
        results = iter(plan)

        def take(last: _Step | None = None) -> Generator[Any, Any, None]:
            """The next results, once they are there: to this one, or all."""
            for step in results:
                yield done[step]
                yield room.put(1)
                if step == last:
                    return

        for i in shards:
            for j, tensor in enumerate(self._model[i]):
                if tensor.quantized:
                    yield from take((QUANTIZE, (i, j)))
                else:
                    yield from host.reader.serve(tensor.n_bytes / rates.read)
                yield from host.writer.serve(tensor.written / rates.write)
        yield from take()


def faster(rates: Rates, names: Iterable[str], times: float) -> Rates:
    """These rates so many times as high."""
    return dataclasses.replace(rates, **{name: times * getattr(rates, name) for name in names})
