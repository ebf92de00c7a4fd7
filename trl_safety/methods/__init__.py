"""One file per paper: tensors in, tensors out, equations cited. Knows nothing of models or trainers."""
