"""Hidden seeds are exchanged for others: the same for everyone, unknown before."""

import ast

import pytest
import torch

from course.seeds import NAME, Salt, salted


def run(code, salt):
    namespace = {NAME: salt.seed}
    exec(compile(salted(ast.parse(code)), "<check>", "exec"), namespace)
    return namespace


DRAWS = """
import random
import numpy as np
import torch
torch.manual_seed(1)
a = torch.randn(3)
b = torch.randn(3, generator=torch.Generator().manual_seed(1))
random.seed(1)
c = random.random()
np.random.seed(1)
d = np.random.rand()
e = np.random.default_rng(1).random()
"""


def numbers(salt):
    found = run(DRAWS, salt)
    return [*found["a"].tolist(), *found["b"].tolist(), found["c"], found["d"], found["e"]]


@pytest.mark.filterwarnings("ignore")
def test_every_written_seed_gives_other_numbers_which_only_secret_place_and_attempt_decide():
    salt = Salt(b"secret", "w03_clip/loss-law")
    plain = {}
    exec(DRAWS, plain)
    mine = numbers(salt)
    assert mine == numbers(Salt(b"secret", "w03_clip/loss-law"))
    assert not set(mine) & {*plain["a"].tolist(), *plain["b"].tolist(), plain["c"], plain["d"]}
    for other in (
        Salt(b"another", "w03_clip/loss-law"),
        Salt(b"secret", "w03_clip/loss-example"),
        Salt(b"secret", "w03_clip/loss-law", attempt=1),
    ):
        assert not set(mine) & set(numbers(other))


def test_two_seeds_of_one_check_stay_two_and_one_stays_one():
    salt = Salt(b"secret", "week/check")
    assert salt.seed(1, 63) == salt.seed(1, 63) != salt.seed(2, 63)
    assert 0 <= salt.seed(1, 32) < 2**32


def test_what_is_no_seed_is_left_alone():
    salt = Salt(b"secret", "week/check")
    code = (
        "class Bank:\n    def seed(self, *a): return a\nx = Bank().seed('corn')\ny = [1].index(1)"
    )
    found = run(code, salt)
    assert (found["x"], found["y"]) == (("corn",), 0)


def test_a_check_that_seeds_nothing_has_its_numbers_too():
    salt = Salt(b"secret", "week/check")
    salt.start()
    first = torch.randn(4)
    torch.randn(4)
    salt.start()
    assert torch.equal(first, torch.randn(4))
