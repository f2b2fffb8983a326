"""Open the GPU through whichever binding of CUDA is installed."""

from engines.trt.bindings_device import BindingsDevice
from engines.trt.device import Device, DeviceError
from engines.trt.gpu import DRIVER, find_gpu
from engines.trt.pycuda_device import PycudaDevice


def open_device() -> Device:
    """Open the first GPU through cuda-bindings, else pycuda: whichever is installed.

    Raises:
        DeviceError: there is no GPU, neither is installed, or the GPU cannot be opened.
    """
    if find_gpu() is None:
        raise DeviceError(
            f"running TensorRT engines needs an NVIDIA GPU and its driver ({DRIVER}), found "
            "none; to check a bundle without one: qvla verify --runtime ort"
        )
    missing = []
    for one in (BindingsDevice, PycudaDevice):
        try:
            return one()
        except ImportError as error:
            missing.append(str(error))
    raise DeviceError(
        f"running TensorRT engines needs cuda-bindings, or pycuda ({'; '.join(missing)}); "
        "pip install 'qvla[board]'"
    )
