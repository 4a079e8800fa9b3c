"""Policies that move the weights of a mixture."""
