"""In every process that a launcher starts: Axolotl, too, takes FSDP for a matter of GPUs."""

import os

if os.environ.get("LOCAL_RANK") is not None:
    import torch
    from accelerate.parallelism_config import ParallelismConfig

    import tests.training.engine_device  # noqa: F401

    if not torch.cuda.is_available():
        build = ParallelismConfig.build_device_mesh
        ParallelismConfig.build_device_mesh = lambda self, device_type: build(self, "cpu")
