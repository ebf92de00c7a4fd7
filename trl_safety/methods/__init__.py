"""One paper a file: tensors in, tensors out, equations cited. Knows no model and no trainer."""
