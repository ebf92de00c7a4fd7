"""Runs in every process that a launcher starts: Axolotl, too, assumes that several processes use GPUs."""

import os

if os.environ.get("LOCAL_RANK") is not None:
    import torch

    if not torch.cuda.is_available():

        def no_gpus(device: object, peer: object) -> bool:
            """The error of a torch build without CUDA. Axolotl expects it, not that of a CUDA build without a driver."""
            raise AssertionError("no CUDA")

        torch.cuda.can_device_access_peer = no_gpus

    if os.environ.get("ENGINE_ON_CPU"):
        from accelerate.parallelism_config import ParallelismConfig

        import tests.training.engine_device  # noqa: F401

        if not torch.cuda.is_available():
            build = ParallelismConfig.build_device_mesh
            ParallelismConfig.build_device_mesh = lambda self, device_type: build(self, "cpu")
