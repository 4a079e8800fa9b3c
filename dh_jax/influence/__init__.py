"""Which documents helped or harmed: gradients, DataInf, and the optimizer that acts on it."""
