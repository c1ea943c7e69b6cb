"""Reads the network of a checkpoint one layer at a time, on any number of hosts."""

import collections

import jax
import numpy as np
import tensorstore
from jax.experimental import multihost_utils

from llada_jax.checkpoints.checksums import checksum_of_array
from llada_jax.checkpoints.workdir import Checkpoints
from llada_jax.models.adapters import NUM_INPUT_DIMS, adapter_dims, with_adapter
from llada_jax.models.int8 import dequantised, scale_shape
from llada_jax.storage.arrays import read_chunks


class LayerReader:
    """The network of one step, with the adapters added where the run trained some.

    The record holds one checksum of each array, of all its layers, and these are read by different
    hosts. So each layer's share of the sum is taken when it is read, and `check` compares the
    totals of all hosts with the record.

    Args:
        ema: the moving average of the parameters instead of the parameters.
    """

    def __init__(self, checkpoints: Checkpoints, step: int, *, ema: bool) -> None:
        self._checkpoints, self._step = checkpoints, step
        record = checkpoints.record(step)
        self._lora, self._scheme = record.lora, record.checksum_scheme
        # Sorted, so that row i of `check` is the same array on every host.
        self._paths = sorted(
            f"{item}/{path}" for item, sums in (record.checksums or {}).items() for path in sums
        )
        self._trained = "ema" if ema else "params"
        self._sums: dict[str, int] = collections.defaultdict(int)
        # of the parameter that is being read
        self._path = ""
        # of its arrays: (the first layer that is held, the layers)
        self._held: dict[str, tuple[int, np.ndarray]] = {}

    def read(self, path: str, shape: tuple[int, ...], layer: int | None) -> np.ndarray:
        """Returns one layer of a parameter such as "blocks/q", or all of one without layers,
        float32.

        Each layer is to be read once, by one of the hosts; the layers of one parameter after the
        other.

        Args:
            shape: of the whole array.

        Raises:
            UserError: it cannot be read.
        """
        if path != self._path:
            # so that no more than the arrays of one parameter are held
            self._held.clear()
            self._path = path
        if not self._lora.rank:
            return self._read(f"{self._trained}/{path}", shape, layer)
        matrix = self._read(f"frozen/{path}", shape, layer)
        if path in self._lora.int8_paths:
            of_scale = scale_shape(shape, NUM_INPUT_DIMS[path])
            matrix = dequantised(matrix, self._read(f"frozen/scales/{path}", of_scale, layer))
        if path not in self._lora.paths:
            return matrix
        a, b = (
            self._read(f"{self._trained}/{path}/{part}", part_shape, layer)
            for part, part_shape in zip("ab", adapter_dims(path, shape, self._lora))
        )
        return with_adapter(matrix, a, b, self._lora)

    def _read(self, path: str, shape: tuple[int, ...], layer: int | None) -> np.ndarray:
        if layer is None:
            # One host reads the whole array, so that its checksum can be compared at once.
            return self._checkpoints.read_array(self._step, path, shape)
        first, layers = self._held.get(path, (0, ()))
        if not first <= layer < first + len(layers):
            # gone before the next are read, so that no two are held
            self._held.pop(path, None)
            layers = ()
            first, layers = self._held[path] = self._read_chunk(path, shape, layer)
        array = layers[layer - first]
        # With a dim of one in front, for the index of the layer, which the checksum includes.
        self._sums[path] += checksum_of_array(array[None], scheme=self._scheme, first=layer)
        return array.astype(np.float32, copy=False)

    def _read_chunk(self, path: str, shape: tuple[int, ...], layer: int) -> tuple[int, np.ndarray]:
        """Returns (first, layers): the layer and those that share its chunks on the disk, which
        are one layer of a large array, and more in older checkpoints.
        """
        store = self._checkpoints.open_array(self._step, path, shape)
        in_chunk = (store.chunk_layout.read_chunk.shape or shape)[0] or 1
        first = layer // in_chunk * in_chunk
        part = store[first : min(first + in_chunk, shape[0])]
        with self._checkpoints.reading(self._step):
            # A part of a tensorstore keeps the indices of the whole; read_chunks counts from 0.
            return first, read_chunks(part[tensorstore.d[0].translate_to[0]])

    def check(self) -> None:
        """Compares what all hosts have read with the checksums of the record; all of them call it.

        Raises:
            UserError: a number is not what was saved.
        """
        # every host has read other layers, and perhaps of fewer arrays
        ours = np.array(
            [[self._sums.get(path, 0) % 2**32, path in self._sums] for path in self._paths],
            # In 32 bits, which JAX exchanges as they are.
            np.uint32,
        )
        if jax.process_count() > 1:
            # In 64 bits, so that adding up the hosts does not wrap around before the modulo below.
            ours = multihost_utils.process_allgather(ours).astype(np.uint64).sum(axis=0)
        # What no host has read, such as the state of the optimizer, has no sum to compare.
        sums = {path: int(n) % 2**32 for path, (n, readers) in zip(self._paths, ours) if readers}
        self._checkpoints.check_sums(self._step, sums)
