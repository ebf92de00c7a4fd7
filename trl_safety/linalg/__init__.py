"""Linear algebra on thin factors: operators, products, singular values. Knows torch and nothing else."""
