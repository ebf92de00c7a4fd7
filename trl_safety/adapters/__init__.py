"""The only code that knows PEFT's and safetensors' names: LoRA factors, checkpoints, the subspace file, adapter folders."""
