"""Submissions that a grader must withstand: each is a few lines that make a notebook.

One module for each row of the table "What each kind of submission gets". A case says what it must
earn, and why not more; `test_corpus.py` says what must hold for all of them.

Every case is harmless where isolation fails: loops and sizes are bounded, what is read and written
are decoys, what would hurt a host is only opened, and signals go to the case's own processes.
"""

from . import damage, forgeries, intake, limits, noise, ordinary, outside, pages, values, wire
from .kit import Case, Kit

MODULES = (ordinary, forgeries, values, wire, outside, limits, noise, damage, pages)
CASES: tuple[Case, ...] = tuple(case for module in MODULES for case in module.CASES)
INTAKE: tuple[Case, ...] = tuple(intake.CASES)

__all__ = ["CASES", "INTAKE", "Case", "Kit"]
