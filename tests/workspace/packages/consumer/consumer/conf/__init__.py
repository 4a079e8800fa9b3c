"""Configs of the application; Hydra wants their folder to be a package."""
