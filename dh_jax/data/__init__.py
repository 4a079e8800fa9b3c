"""Sources, tokens, stores, packing, mixing and loaders: NumPy alone, no JAX."""
