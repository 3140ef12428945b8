"""A real NVIDIA Triton on this machine, without Docker or a GPU: start it, watch it, stop it.

The server is the one in the wheel `nvidia-pytriton`, installed in an environment of its own, and
serves the model repository as it is; `serving/backends/onnxruntime` stands in for NVIDIA's
onnxruntime backend. Everything listens on 127.0.0.1 only. With certificates gRPC has TLS by Triton
itself, and HTTP by an nginx in front of it (`serving/nginx.conf.template`).

    python -m serving local --repository model_repository --model chestct_compressed
"""

from serving.local.installation import (
    Installation,
    LocalTritonError,
    find_installation,
    uses_gpu,
)
from serving.local.server import LocalTriton
from serving.local.tls import Certificates

__all__ = [
    "Certificates",
    "Installation",
    "LocalTriton",
    "LocalTritonError",
    "find_installation",
    "uses_gpu",
]
