"""Linear algebra on thin factors: operators, products, singular values. Depends on torch alone."""
