"""What an adapter or a data set does, seen from the alignment subspace."""
