"""The noun `Buffers`: device memory of every tensor, and pinned memory of those the host sees."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.trt.device import Address, Device
from engines.trt.shapes import Shape, ShapeRange
from qvla_export.shared.part import TensorSpec


class Buffers:
    """Allocated once, each for its largest shape. Parts hand tensors on by sharing memory."""

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
            tensors: inputs and outputs of all parts; equal names are one tensor.
            at_host: those that are copied in or out.
            ranges: name -> shapes.

        Raises:
            DeviceError: the GPU has too little memory.
        """
        self._device = device
        self.addresses: dict[str, Address] = {}
        self._pinned: dict[str, NDArray[Any]] = {}
        try:
            for spec in tensors:
                if spec.name not in self.addresses:
                    nbytes = _size(ranges[spec.name].max) * np.dtype(spec.dtype).itemsize
                    self.addresses[spec.name] = device.allocate(nbytes)
        except BaseException:
            self.free()
            raise
        for spec in at_host:
            self._pinned[spec.name] = device.pinned((_size(ranges[spec.name].max),), spec.dtype)

    def upload(self, name: str, value: NDArray[Any]) -> None:
        """Start copying an input to the device."""
        view = self._pinned[name][: value.size]
        view[:] = value.reshape(-1)
        self._device.copy_in(self.addresses[name], view)

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
