"""The workshop: makes, checks and grades the weeks. `python -m course --help` lists the verbs.

`source` reads a week, `build` turns it into notebooks, `check` runs them, `verify` proves that
the grading means something, `classroom` and `grade` drive nbgrader. It imports `mmlearn`;
`mmlearn` never imports it.
"""
