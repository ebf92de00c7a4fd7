"""Corrections of a trained adapter: on a live model and on saved folders."""
