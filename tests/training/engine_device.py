"""Imported first in a process under `accelerate launch`: Accelerate assumes GPUs for FSDP and DeepSpeed, but both also run on CPUs.

Only Accelerate's choice of device and backend is overridden; the engines are the real ones.
"""

from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

if not torch.cuda.is_available():

    def backend(self: Any, cpu: bool = False, sagemaker: bool = False, backend: str | None = None) -> tuple[str, DistributedType]:
        """See `PartialState`."""
        return "gloo", DistributedType.MULTI_GPU

    def device(self: Any) -> None:
        """See `PartialState`."""
        self.device = torch.device("cpu")

    PartialState._prepare_backend = backend
    PartialState.set_device = device
torch.set_num_threads(1)
