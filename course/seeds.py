"""Other numbers for the seeds that are written in hidden tests.

A hidden test says `torch.manual_seed(1)`, and this repository is open: whoever reads it knows the
numbers that are drawn. So the grader exchanges such seeds for others, which depend on a secret of
the course. They are the same for every student and at every regrade, and unknown before.
`course verify` does the same with secrets of its own, to prove that no verdict hangs on a seed.
"""

import ast
import hmac
import json
import random
from dataclasses import dataclass

# What takes a seed, and of how many bits.
_SEEDING = {"manual_seed": 63, "seed": 32, "default_rng": 32, "RandomState": 32}
NAME = "_salted"  # what the changed code calls; bind it to a Salt's `seed`


@dataclass(frozen=True)
class Salt:
    """Where the random numbers of one check come from.

    `place` is "week/check". `attempt` is above 0 when the course's own solution failed under the
    numbers before it.
    """

    secret: bytes
    place: str
    attempt: int = 0

    def number(self, word: object, bits: int) -> int:
        """A whole number of so many bits, from HMAC-SHA-256 of the place and the word."""
        message = json.dumps([self.place, self.attempt, repr(word)]).encode()
        return int.from_bytes(hmac.digest(self.secret, message, "sha256")[:8], "big") >> 64 - bits

    def seed(self, given: object, bits: int) -> object:
        """What a seed written in a check becomes; what is no whole number stays what it is."""
        return self.number(given, bits) if isinstance(given, int) else given

    def start(self) -> None:
        """Seed everything that a check might draw from without seeding it."""
        import numpy as np
        import torch

        torch.default_generator.manual_seed(self.number("start", 63))
        random.seed(self.number("start", 63))
        np.random.seed(self.number("start", 32))  # noqa: NPY002 (checks may draw from it)


def salted(tree: ast.Module) -> ast.Module:
    """The code with every written seed given to `_salted` first."""
    return ast.fix_missing_locations(_SaltSeeds().visit(tree))


class _SaltSeeds(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if called in _SEEDING and len(node.args) == 1:
            bits = ast.Constant(_SEEDING[called])
            node.args = [ast.Call(ast.Name(NAME, ast.Load()), [node.args[0], bits], [])]
        return node
