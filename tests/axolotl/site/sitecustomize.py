"""In every process that a launcher starts: Axolotl, too, takes several processes for a matter of GPUs."""

import os

if os.environ.get("LOCAL_RANK") is not None:
    import torch

    if not torch.cuda.is_available():

        def no_gpus(device: object, peer: object) -> bool:
            """What a build of torch without CUDA says. Axolotl expects it, and not what a build with CUDA says without a driver."""
            raise AssertionError("no CUDA")

        torch.cuda.can_device_access_peer = no_gpus

    if os.environ.get("ENGINE_ON_CPU"):
        from accelerate.parallelism_config import ParallelismConfig

        import tests.training.engine_device  # noqa: F401

        if not torch.cuda.is_available():
            build = ParallelismConfig.build_device_mesh
            ParallelismConfig.build_device_mesh = lambda self, device_type: build(self, "cpu")
