"""What stands inside the sandbox: a student's code can read every line of this folder.

Nothing here knows a test, an expected value, a secret or a path to one. Its modules import each
other relatively, and torch, IPython and mmlearn besides: in the sandbox there is no `course`.
"""
