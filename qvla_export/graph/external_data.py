"""Write a graph whose constants go to the file beside it one by one, never all in memory."""

from pathlib import Path
from types import TracebackType

import onnx_ir as ir

_SMALLEST_BYTES = 256  # smaller constants stay in the graph's own file
# A cache line: vectorized reads of a mapped file start on one.
_ALIGNMENT = 64


class ExternalData:
    """The weights file of one graph, open for writing; a context manager.

    The file has no other name until the graph is complete, so a half-written one vouches for
    nothing; the caller renames or records it.
    """

    def __init__(self, model_path: Path) -> None:
        self._model_path = model_path
        self._data_path = model_path.with_name(f"{model_path.name}.data")
        self._file = self._data_path.open("wb")

    def store(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """Write a constant's bytes and return a reference to them; small ones are just read."""
        if isinstance(tensor, ir.ExternalTensor):
            return tensor
        if tensor.nbytes < _SMALLEST_BYTES:
            return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
        offset = self._file.tell()
        data = tensor.tobytes()
        self._file.write(data)
        return ir.ExternalTensor(
            self._data_path.name,
            offset,
            len(data),
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            base_dir=self._data_path.parent,
        )

    def save(self, model: ir.Model) -> None:
        """Write the constants that are not yet in the file, and the graph."""
        for value in model.graph.initializers.values():
            if value.const_value is not None:
                value.const_value = self.store(value.const_value)
        self._file.flush()
        ir.save(model, self._model_path)

    def __enter__(self) -> "ExternalData":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
