"""The demo: a mixture of real text from installed packages, trained, steered and reported."""
