"""Measures adapters and data sets against the alignment subspace."""
