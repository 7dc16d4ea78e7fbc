"""A simulation of `nvfp4sweep quantize`: its steps, who waits for whom, and what they share.

Each step of a tensor takes its bytes divided by a rate that benchmarks.checkpoint measured. Processes of a
host share its disk, one tensor at a time; each has its own cores and devices, which take one tensor at a time
too. So the simulation says how steps overlap and queue, and nothing about what a rate becomes under load.
"""

import dataclasses
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import simpy

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


@dataclass(frozen=True)
class Rates:
    """Bytes a second: of weights as they are stored, and for `write` of what is written.

    Attributes:
        read, write: of a host's disk.
        read_cached: of a file that the host still has in memory, a process.
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
    """Processes on hosts that see one file system, whose rates are those of each host."""

    rates: Rates
    hosts: int = 1
    processes: int = 1  # on each host
    devices: int = 1  # of each process
    keeps: bool = True  # in memory what a host has read


class Spent(NamedTuple):
    """Seconds: the whole, its first pass, and how long the busiest resource of each kind was busy."""

    seconds: float
    first_pass: float
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


def simulate(model: Sequence[Shard], cluster: Cluster) -> Spent:
    """Quantize the shards of a model."""
    return _Run(model, cluster).spent()


class _Run:
    def __init__(self, model: Sequence[Shard], cluster: Cluster) -> None:
        self._model, self._rates, self._cluster = model, cluster.rates, cluster
        self._env = simpy.Environment()
        self._hosts = [_Host(self._env, cluster.processes, cluster.devices) for _ in range(cluster.hosts)]
        self._size_of_world = cluster.hosts * cluster.processes
        self._cached: set[tuple[int, int, int]] = set()  # host, shard, tensor

    def spent(self) -> Spent:
        self._on_all(self._to_search(), self._first_pass)
        first_pass = self._env.now
        self._on_all(self._to_write(), self._second_pass)
        processes = [process for host in self._hosts for process in host.processes]
        busy = {
            "disk's reading": max(host.reader.busy for host in self._hosts),
            "disk's writing": max(host.writer.busy for host in self._hosts),
            "cores": max(process.cores.busy for process in processes),
            "device": max(device.busy for process in processes for device in process.devices),
        }
        return Spent(self._env.now, first_pass, busy)

    def _to_write(self) -> list[list[int]]:
        """The shards of each process, as checkpoint.quantizer shares them."""
        n_bytes = [sum(tensor.n_bytes for tensor in shard) for shard in self._model]
        return shares(range(len(self._model)), n_bytes.__getitem__, self._size_of_world)

    def _to_search(self) -> list[list[tuple[int, int]]]:
        """The weights of each process in the first pass, likewise."""
        weights = [
            [(i, j) for j, t in enumerate(shard) if t.quantized] for i, shard in enumerate(self._model)
        ]
        if len(self._model) < self._size_of_world:
            return shares(list(chain(*weights)), self._size, self._size_of_world)
        return [list(chain(*(weights[i] for i in mine))) for mine in self._to_write()]

    def _on_all(self, share_of_each: Iterable[Any], work: Callable[..., Any]) -> None:
        """And wait for all of them."""
        for rank, mine in enumerate(share_of_each):
            host, process = divmod(rank, self._cluster.processes)
            self._env.process(work(host, self._hosts[host].processes[process], mine))
        self._env.run()

    def _size(self, place: tuple[int, int]) -> int:
        return self._model[place[0]][place[1]].n_bytes

    def _read(self, number: int, place: tuple[int, int]) -> Generator[Any, Any, None]:
        n_bytes = self._size(place)
        if (number, *place) in self._cached:
            yield self._env.timeout(n_bytes / self._rates.read_cached)
        else:
            yield from self._hosts[number].reader.serve(n_bytes / self._rates.read)
            if self._cluster.keeps:
                self._cached.add((number, *place))

    def _first_pass(
        self, number: int, process: _Process, weights: Iterable[tuple[int, int]]
    ) -> Generator[Any, Any, None]:
        """A weight is read while the last one's amax is found."""
        room, coming = simpy.Container(self._env, init=2), simpy.Store(self._env)

        def read() -> Generator[Any, Any, None]:
            for place in weights:
                yield room.get(1)
                yield from self._read(number, place)
                yield coming.put(place)

        self._env.process(read())
        for _ in weights:
            place = yield coming.get()
            yield from process.cores.serve(self._size(place) / self._rates.amax)
            yield room.put(1)

    def _second_pass(
        self, number: int, process: _Process, shards: Sequence[int]
    ) -> Generator[Any, Any, None]:
        """Reads ahead, searches and reports on two weights a device, writes in order."""
        host, rates = self._hosts[number], self._rates
        workers = 2 * len(process.devices)
        room = simpy.Container(self._env, init=workers + 1)
        engines = simpy.Store(self._env)
        engines.items.extend(process.devices)
        busy_workers = simpy.Resource(self._env, workers)
        done = {
            (i, j): self._env.event()
            for i in shards
            for j, tensor in enumerate(self._model[i])
            if tensor.quantized
        }

        def make(place: tuple[int, int]) -> Generator[Any, Any, None]:
            with busy_workers.request() as turn:
                yield turn
                engine = yield engines.get()
                yield from engine.serve(self._size(place) / rates.quantize)
                yield engines.put(engine)
                yield from process.cores.serve(self._size(place) / rates.report)
            done[place].succeed()

        def read() -> Generator[Any, Any, None]:
            for place in done:
                yield room.get(1)
                yield from self._read(number, place)
                self._env.process(make(place))

        self._env.process(read())
        for i in shards:
            for j, tensor in enumerate(self._model[i]):
                if tensor.quantized:
                    yield done[i, j]
                    yield room.put(1)
                else:
                    yield from self._read(number, (i, j))
                yield from host.writer.serve(tensor.written / rates.write)


def faster(rates: Rates, names: Iterable[str], times: float) -> Rates:
    """These rates so many times as high."""
    return dataclasses.replace(rates, **{name: times * getattr(rates, name) for name in names})
