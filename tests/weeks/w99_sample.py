# %% [markdown]
# # Week 99. What does a week look like to its tools?
#
# Two small exercises and one written question: enough for every kind of cell.

# %% tags=["parameters"]
SEED = 0
DEVICE = "cpu"
SCALE = "cpu"
DATA = "embedded"

# %%
import torch
from torch import nn

torch.manual_seed(SEED)
scores = torch.randn(4, 3)

# %% [markdown] exercise="softmax" difficulty=2 minutes=10
# ### Exercise: from scores to shares
#
# $$ p_i = \frac{e^{s_i}}{\sum_j e^{s_j}} $$
#
# <details><summary>Hint</summary>
#
# Subtract the largest score first.
#
# </details>


# %% answer="softmax"
def softmax(scores):
    """Turn each row of scores into shares that sum to one."""
    ### BEGIN SOLUTION
    powers = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return powers / powers.sum(dim=-1, keepdim=True)
    ### END SOLUTION


# %% check="softmax" aspect="example" points=2 title="numbers you can work by hand"
import torch
from mmlearn.feedback import expect

rows = torch.log(torch.tensor([[1.0, 3.0], [1.0, 1.0]]))
expect(
    "w99_sample/softmax/hand",
    softmax(rows),
    torch.tensor([[0.25, 0.75], [0.5, 0.5]]),
    "The scores log 1 and log 3 have the shares 1/4 and 3/4.",
)
### BEGIN HIDDEN TESTS
generator = torch.Generator().manual_seed(1)
wide = torch.randn(2, 3, 5, generator=generator)
assert torch.allclose(torch.softmax(wide, dim=-1), softmax(wide), atol=1e-6)
assert softmax(wide).shape == (2, 3, 5)
### END HIDDEN TESTS

# %% check="softmax" aspect="overflow" points=1 title="survives scores of a thousand"
### BEGIN HIDDEN TESTS
import torch

huge = torch.tensor([[1000.0, 0.0]])
assert torch.equal(softmax(huge), torch.tensor([[1.0, 0.0]]))
### END HIDDEN TESTS


# %% wrong="softmax" name="wrong_axis" says="Your shares sum to one down the columns. Each row is its own question: normalise along the last axis."
def softmax(scores):
    powers = torch.exp(scores - scores.max())
    return powers / powers.sum(dim=0, keepdim=True)


# %% wrong="softmax" name="no_sum" says="These are powers, not shares yet: divide each row by its sum."
def softmax(scores):
    return torch.exp(scores - scores.max(dim=-1, keepdim=True).values)


# %% wrong="softmax" name="overflows" says="Large scores overflow: subtract each row's largest score first, which changes no share."
def softmax(scores):
    powers = torch.exp(scores)
    return powers / powers.sum(dim=-1, keepdim=True)


# %% tags=["experiment"]
print(softmax(scores))

# %% [markdown] exercise="running_mean" difficulty=1 minutes=5
# ### Exercise: a mean that needs no list


# %% answer="running_mean"
class RunningMean(nn.Module):
    """The mean of all values seen so far."""

    def __init__(self):
        super().__init__()
        ### BEGIN SOLUTION
        self.register_buffer("total", torch.zeros(()))
        self.count = 0
        ### END SOLUTION

    def forward(self, value):
        """Take one value into account and return the mean so far."""
        ### BEGIN SOLUTION
        if not torch.isfinite(torch.as_tensor(value)):
            raise ValueError(f"value is {value}: give a finite number.")
        self.total += value
        self.count += 1
        return self.total / self.count
        ### END SOLUTION


# %% check="running_mean" aspect="example" points=2 title="the mean of 1, 2 and 6"
from mmlearn.feedback import expect, expect_raises

mean = RunningMean()
expect(
    "w99_sample/running_mean/hand",
    [float(mean(value)) for value in (1.0, 2.0, 6.0)],
    [1.0, 1.5, 3.0],
    "After 1, 2 and 6 the means are 1, 1.5 and 3.",
)
expect_raises(
    "w99_sample/running_mean/infinite",
    ValueError,
    lambda: RunningMean()(float("inf")),
    "An infinite value must raise a ValueError.",
)
### BEGIN HIDDEN TESTS
other = RunningMean()
for number in range(10):
    last = other(float(number))
assert abs(float(last) - 4.5) < 1e-6
try:
    other(float("nan"))
except ValueError:
    pass
else:
    raise AssertionError("not a number must be refused")
### END HIDDEN TESTS


# %% wrong="running_mean" name="last_value" says="You return the last value. Keep a sum and a count."
class RunningMean(nn.Module):
    def forward(self, value):
        if not torch.isfinite(torch.as_tensor(value)):
            raise ValueError("value is not finite")
        return torch.as_tensor(value)


# %% wrong="running_mean" name="counts_late" says="You divide before counting the new value, so the first mean divides by nothing."
class RunningMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.total, self.count = torch.zeros(()), 0

    def forward(self, value):
        if not torch.isfinite(torch.as_tensor(value)):
            raise ValueError("value is not finite")
        self.total = self.total + value
        self.count += 1
        return self.total / max(self.count - 1, 1)


# %% wrong="running_mean" name="takes_anything" says="An infinite value spoils every mean after it: refuse it with a ValueError."
class RunningMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.total, self.count = torch.zeros(()), 0

    def forward(self, value):
        self.total = self.total + value
        self.count += 1
        return self.total / self.count


# %% [markdown] written="why_max" points=2
# **In your own words.** Why may softmax subtract the largest score, and why should it?
#
# ### BEGIN SOLUTION
# Numerator and denominator are multiplied by the same factor, so no share changes; and the
# largest exponent becomes zero, so nothing overflows.
# ### END SOLUTION
# ### BEGIN MARK SCHEME
# - 1 point: the factor cancels.
# - 1 point: overflow is avoided.
# ### END MARK SCHEME

# %% [markdown]
# ## What was new
#
# | word | meaning |
# |---|---|
# | share | a number between 0 and 1; a row of them sums to 1 |
