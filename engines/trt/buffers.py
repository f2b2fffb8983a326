"""The noun `Buffers`: device memory of every tensor, and pinned memory of those the host sees."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.trt.device import Address, Device
from engines.trt.shapes import Shape, ShapeRange
from qvla_export.shared.part import TensorSpec


class Buffers:
    """Allocated once, each for its largest shape.

    Parts hand tensors on by sharing memory. What a repetition puts out and the next one reads under
    another name changes memory with it; what cannot is copied.
    """

    def __init__(
        self,
        device: Device,
        tensors: Iterable[TensorSpec],
        at_host: Sequence[TensorSpec],
        ranges: Mapping[str, ShapeRange],
    ) -> None:
        """Allocate everything.

        Args:
            device: whose memory.
            tensors: inputs of the bundle, inputs and outputs of all parts; equal names are one
                tensor.
            at_host: those that are copied in or out.
            ranges: name -> shapes.

        Raises:
            DeviceError: the GPU has too little memory.
        """
        self._device = device
        self.addresses: dict[str, Address] = {}
        self._pinned: dict[str, NDArray[Any]] = {}
        self._item_bytes: dict[str, int] = {}
        self._nbytes: dict[str, int] = {}
        try:
            for spec in tensors:
                self._item_bytes[spec.name] = np.dtype(spec.dtype).itemsize
                if spec.name not in self.addresses:
                    nbytes = _size(ranges[spec.name].max) * np.dtype(spec.dtype).itemsize
                    self.addresses[spec.name] = device.allocate(nbytes)
                    self._nbytes[spec.name] = nbytes
        except BaseException:
            self.free()
            raise
        self._first = dict(self.addresses)
        for spec in at_host:
            self._pinned[spec.name] = device.pinned((_size(ranges[spec.name].max),), spec.dtype)

    def upload(self, name: str, value: NDArray[Any]) -> None:
        """Start copying an input to the device."""
        view = self._pinned[name][: value.size]
        view[:] = value.reshape(-1)
        self._device.copy_in(self.addresses[name], view)

    def move(self, source: str, name: str, shape: Shape) -> None:
        """Start copying a tensor of a shape into another one of its type, on the device."""
        nbytes = _size(shape) * self._item_bytes[source]
        self._device.copy(self.addresses[name], self.addresses[source], nbytes)

    def exchange(self, output: str, name: str, shape: Shape) -> None:
        """Let an input have what an output of a shape holds, and the output the input's memory.

        Where their largest shapes differ it is copied instead.
        """
        if self._nbytes[output] == self._nbytes[name]:
            places = self.addresses
            places[output], places[name] = places[name], places[output]
        else:
            self.move(output, name, shape)

    def reset(self) -> None:
        """Give every tensor the memory that it had at first: an action begins as all others."""
        self.addresses.update(self._first)

    def download(self, name: str, shape: Shape) -> NDArray[Any]:
        """Start copying an output to the host; it is there after `Device.synchronize`.

        The next download of the same name overwrites it.
        """
        view = self._pinned[name][: _size(shape)]
        self._device.copy_out(view, self.addresses[name])
        return view.reshape(shape)

    def free(self) -> None:
        """Give all memory back."""
        for address in self.addresses.values():
            self._device.free(address)
        self.addresses.clear()
        self._pinned.clear()


def _size(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))
