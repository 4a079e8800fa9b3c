"""The demo: corpora from installed packages, and the study that trains on them."""
