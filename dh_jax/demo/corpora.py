"""The demo's corpora: real text that installed packages and Python itself carry.

Nothing is downloaded, and no package is imported only to be read: sources and metadata are
opened where the installer left them. Six domains that differ in kind, one JSONL file each:

========  =======================================================================
code      Python: the standard library (without tests and tables) and fontTools
docs      docstrings, one document a module; long descriptions; Python's topics
prose     the King James Bible, one document a chapter
maths     arithmetic, algebra, number theory and geometry (generated); CHAMP
puzzles   words, grids, graphs, games and logic (generated)
cpp       C and C++ headers and sources of pyarrow and NumPy
========  =======================================================================

`code` and `docs` share no package, so no held-out docstring is a comment of training code. Each
package's licence is read from its own metadata and must be permissive, or the build refuses.
The output is a pure function of the packages' versions, the seed and the limit.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dh_jax.errors import DataError

BUILDER_VERSION = 1  # raise it when the same packages would give other text
MANIFEST = "corpora.json"
PYTHON = "python"  # the standard library, which is no distribution
LEAST_CHARACTERS = 80  # shorter documents (empty __init__ files) are skipped and counted

# --- what is read ----------------------------------------------------------------------------

DOCUMENTED = (
    "scipy", "jax", "numpy", "matplotlib", "transformers", "huggingface_hub", "flax",
    "orbax-checkpoint", "datasets", "optax", "rich", "pillow", "fsspec", "grain", "pyarrow",
)  # fmt: skip

# Generators of reasoning-gym whose problems are the same in every process and have an answer.
# Left out: gsm_symbolic and codeio (their texts derive from other data sets), figlet_font (its
# fonts have no one licence), and those that search for more than a few milliseconds a problem.
MATHS = (
    "advanced_geometry", "base_conversion", "basic_arithmetic", "bitwise_arithmetic",
    "calendar_arithmetic", "chain_sum", "coin_flip", "complex_arithmetic", "count_bits",
    "count_primes", "decimal_arithmetic", "decimal_chain_sum", "dice", "fraction_simplification",
    "gcd", "lcm", "leg_counting", "modulo_grid", "number_format", "number_sequence",
    "polynomial_equations", "polynomial_multiplication", "power_function", "prime_factorization",
    "products", "simple_equations", "simple_geometry", "simple_integration", "time_intervals",
)  # fmt: skip
PUZZLES = (
    "ab", "acre", "aiw", "arc_1d", "binary_alternation", "binary_matrix", "caesar_cipher",
    "circuit_logic", "color_cube_rotation", "course_schedule", "cryptarithm",
    "family_relationships", "group_anagrams", "isomorphic_strings", "kakurasu", "knights_knaves",
    "largest_island", "letter_counting", "letter_jumble", "mahjong_puzzle", "manipulate_matrix",
    "maze", "mini_sudoku", "n_queens", "needle_haystack", "number_filtering", "number_sorting",
    "palindrome_generation", "palindrome_partitioning", "path_star", "pool_matrix", "ransom_note",
    "rotate_matrix", "rotten_oranges", "self_reference", "sentence_reordering", "shortest_path",
    "spiral_matrix", "string_insertion", "string_manipulation", "survo", "syllogism",
    "tower_of_hanoi", "tsumego", "word_sequence_reversal", "word_sorting",
)  # fmt: skip
CHARACTERS = {"maths": 220_000, "puzzles": 140_000}  # of each generator, at most
SLOW = 250  # problems of each generator named next: they take 5 to 40 ms each
SLOW_GENERATORS = frozenset(
    {"advanced_geometry", "polynomial_equations", "polynomial_multiplication", "simple_integration"}
)
