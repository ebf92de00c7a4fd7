"""DualSelect in training."""
