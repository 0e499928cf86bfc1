"""Evil values: what an answer returns, raises or is, made to fool or to break who receives it."""

from .kit import (
    FULL,
    NOTHING,
    ONLY_MEAN,
    ONLY_SOFTMAX,
    UNUSABLE,
    WRONG,
    collector,
)
from .ordinary import CLIP, clip_with_loss

CASES, case = collector("forgery: values")
LIMIT = r"^it ran longer than"
MEAN_LOST = rf"{UNUSABLE}|^the answer raised|^its process|^it |must be refused"


def returns(expression: str, before: str = "") -> str:
    """An answer that returns something odd."""
    return f"{before}\n\ndef softmax(scores):\n    return {expression}\n"


@case(ONLY_MEAN, UNUSABLE)
def equal_to_everything(kit):
    return kit.hand_in(
        softmax="""
        class Yes:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __bool__(self): return True
            def __float__(self): return 0.25
            def __array__(self, *a, **k):
                import numpy
                return numpy.array([[0.25, 0.75], [0.5, 0.5]])
            __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
            __hash__ = object.__hash__
            shape = property(lambda self: self)
            __class__ = property(lambda self: torch.Tensor)

        def softmax(scores):
            return Yes()
        """
    )


@case(ONLY_MEAN, UNUSABLE)
def a_tensor_with_a_will_of_its_own(kit):
    """A subclass whose every comparison, and every torch function of it, says yes."""
    return kit.hand_in(
        softmax="""
        class Agreeable(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                if function in (torch.allclose, torch.equal, torch.Tensor.__eq__):
                    return True
                return super().__torch_function__(function, types, args, kwargs or {})

        def softmax(scores):
            return scores.as_subclass(Agreeable)
        """
    )


@case(ONLY_MEAN, UNUSABLE)
def runs_code_when_unpickled(kit):
    """A reduction that would write to a decoy in whichever process unpickles it."""
    return kit.hand_in(
        softmax=f"""
        import os

        class Letter:
            def __reduce__(self):
                return (os.system, ("echo opened >> {kit.decoys}/opened",))
            __getstate__ = __reduce_ex__ = lambda self, *a: self.__reduce__()

        def softmax(scores):
            return [Letter(), {{"letter": Letter()}}]
        """
    )


@case(ONLY_MEAN, UNUSABLE)
def contains_itself(kit):
    return kit.hand_in(softmax="def softmax(scores):\n    a = []\n    a.append(a)\n    return a")


@case(ONLY_MEAN, UNUSABLE)
def nested_a_hundred_thousand_deep(kit):
    return kit.hand_in(
        softmax="""
        def softmax(scores):
            nest = 1.0
            for _ in range(100_000):
                nest = [nest]
            return nest
        """
    )


@case(ONLY_MEAN, UNUSABLE)
def a_list_of_millions(kit):
    return kit.hand_in(softmax=returns("[0.25] * 5_000_000"))


@case(ONLY_MEAN, UNUSABLE)
def a_number_of_a_million_digits(kit):
    return kit.hand_in(softmax=returns("1 << 4_000_000"))


@case(ONLY_MEAN, rf"{UNUSABLE}|can't allocate memory")
def a_tensor_larger_than_the_machine(kit):
    """Terabytes by strides: one number in memory."""
    return kit.hand_in(softmax=returns("torch.zeros(1).expand(2**20, 2**20)"))


@case(ONLY_MEAN, rf"{UNUSABLE}|^the answer raised RuntimeError: Storage size")
def a_tensor_with_more_entries_than_numbers_count(kit):
    return kit.hand_in(softmax=returns("torch.empty(2**40, 2**40, 0)"))


@case(ONLY_MEAN, UNUSABLE)
def tensors_on_no_device(kit):
    """Meta, sparse, quantised and nested tensors, none of which has a plain buffer."""
    return kit.hand_in(
        softmax="""
        kinds = [
            lambda s: s.to("meta"),
            lambda s: s.to_sparse(),
            lambda s: torch.quantize_per_tensor(s, 0.1, 0, torch.quint8),
        ]

        def softmax(scores):
            return kinds[len(scores) % 3](scores)
        """
    )


@case(ONLY_MEAN, UNUSABLE)
def columns_that_broadcast(kit):
    """Small on the wire; compared with a row they would be 40 GB."""
    return kit.hand_in(softmax=returns("torch.zeros(100_000, 1)"))


@case(ONLY_MEAN, UNUSABLE)
def subclasses_of_plain_values(kit):
    """A float, a string and a list whose class compares as it likes."""
    return kit.hand_in(
        softmax="""
        class Text(str):
            __eq__ = lambda *a: True
            __hash__ = str.__hash__

        class Number(float):
            __eq__ = lambda *a: True
            __sub__ = __rsub__ = __abs__ = lambda *a: 0.0
            __hash__ = float.__hash__

        class Row(list):
            __eq__ = lambda *a: True
            __len__ = lambda self: 2
            __iter__ = lambda self: iter([[0.25, 0.75], [0.5, 0.5]])

        def softmax(scores):
            return Row([Number(1), Text("yes")])
        """
    )


@case(ONLY_MEAN, UNUSABLE)
def a_generator_without_end(kit):
    return kit.hand_in(
        softmax="""
        import itertools

        def softmax(scores):
            return (torch.tensor(0.25) for _ in itertools.count())
        """
    )


@case(ONLY_SOFTMAX, MEAN_LOST)
def a_sequence_without_end(kit):
    """Its length is a lie, and it has an answer for every index."""
    return kit.hand_in(
        running_mean="""
        class Endless:
            def __len__(self): return 2**62
            def __getitem__(self, index): return self
            def __iter__(self): return self
            def __next__(self): return self
            def __float__(self): return float("nan")

        class RunningMean:
            def __call__(self, value):
                return Endless()
        """
    )


@case(ONLY_MEAN, r"^the answer raised Error: |^the answer raised \w+")
def a_message_of_many_megabytes(kit):
    """With control characters, half a character and markup."""
    return kit.hand_in(
        softmax="""
        class Error(ValueError):
            pass

        def softmax(scores):
            raise Error("\\x1b[2J\\r\\0\\ud800<script>alert(1)</script>" + "x" * 20_000_000)
        """
    )


@case(ONLY_MEAN, rf"^the answer raised|^it raised|{LIMIT}")
def a_message_that_never_comes(kit):
    """The error's text is computed for thirty seconds, then raises another error."""
    return kit.hand_in(
        softmax="""
        import time

        class Slow(ValueError):
            def __str__(self):
                until = time.monotonic() + 30
                while time.monotonic() < until:
                    pass
                raise self
            __repr__ = __str__

        def softmax(scores):
            raise Slow()
        """
    )


@case(ONLY_MEAN, "^the answer raised|^it raised|^its process")
def an_error_with_a_long_family(kit):
    """Its class has a thousand ancestors, an odd name, and attributes that raise."""
    return kit.hand_in(
        softmax="""
        Family = ValueError
        for number in range(1000):
            Family = type(f"E{number}", (Family,), {})
        Family.__name__ = "x" * 100_000 + "\\n<b>"
        Family.__module__ = None
        Family.args = property(lambda self: 1 / 0)

        def softmax(scores):
            raise Family("no")
        """
    )


@case(FULL)
def an_answer_with_evil_attributes(kit):
    """A right function whose every attribute raises or lies."""
    return kit.hand_in(
        softmax="""
        class Odd:
            __name__ = __qualname__ = "x" * 10_000
            __wrapped__ = property(lambda self: self)
            def __getattr__(self, name):
                raise RuntimeError(name)
            def __call__(self, scores):
                return torch.softmax(scores, dim=-1)
            def __eq__(self, other):
                raise RuntimeError("eq")
            __hash__ = None
            def __repr__(self):
                raise RuntimeError("repr")
            def __bool__(self):
                raise RuntimeError("bool")

        softmax = Odd()
        """
    )


@case(ONLY_MEAN, rf"{UNUSABLE}|^the answer raised")
def an_argument_changed_beyond_recognition(kit):
    """What was passed in comes back with another shape, another type, and in another place."""
    return kit.hand_in(
        softmax="""
        def softmax(scores):
            scores.resize_(4096, 4096)
            scores.data = torch.zeros(3, dtype=torch.int8)
            scores.__class__ = torch.nn.Parameter
            scores.grad = torch.zeros(3, dtype=torch.int8)
            return scores
        """
    )


@case(ONLY_SOFTMAX, MEAN_LOST)
def a_module_with_impossible_names(kit):
    """Parameters called forward, __class__, training and a.b."""
    return kit.hand_in(
        running_mean="""
        class RunningMean(nn.Module):
            def __init__(self):
                super().__init__()
                for name in ("forward", "__class__", "training", "a.b", "", "_modules", "\\ud800"):
                    self._parameters[name] = nn.Parameter(torch.ones(2))
                self._modules["load_state_dict"] = nn.Linear(1, 1)
                self._buffers["state_dict"] = torch.ones(1)

            def __call__(self, value):
                return torch.tensor(4.5)
        """
    )


@case(ONLY_SOFTMAX, rf"{MEAN_LOST}")
def a_module_with_endless_parameters(kit):
    return kit.hand_in(
        running_mean="""
        import itertools

        class RunningMean(nn.Module):
            def named_parameters(self, *a, **k):
                one = nn.Parameter(torch.zeros(1))
                return ((f"p{n}", one) for n in itertools.count())

            named_buffers = named_modules = named_children = named_parameters
            parameters = lambda self, *a, **k: (p for _, p in self.named_parameters())
            state_dict = lambda self, *a, **k: dict(itertools.islice(self.named_buffers(), 10**6))

            def forward(self, value):
                return torch.tensor(4.5)
        """
    )


@case(ONLY_SOFTMAX, MEAN_LOST)
def a_module_inside_itself(kit):
    return kit.hand_in(
        running_mean="""
        class RunningMean(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(1, 1)
                self.first.back = self
                self.again = self

            def forward(self, value):
                return torch.tensor(4.5)
        """
    )


@case(ONLY_SOFTMAX, MEAN_LOST)
def a_module_that_grows_with_each_call(kit):
    """Its buffer doubles, changes its type, and vanishes."""
    return kit.hand_in(
        running_mean="""
        class RunningMean(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("total", torch.zeros(1))
                self.calls = 0

            def forward(self, value):
                self.calls += 1
                if self.calls % 3 == 0:
                    del self.total
                    self.register_parameter("total", nn.Parameter(torch.zeros(2, 2)))
                    self.total_again = self.total
                elif "total" in self._buffers:
                    self.total = torch.cat([self.total, self.total]).to(torch.float64)
                else:
                    del self.total
                    self.register_buffer("total", torch.zeros(1, dtype=torch.bool))
                return torch.tensor(4.5)
        """
    )


@case(clip_with_loss(2, 1, 1, 0), "", week="w03_clip")
def a_backward_of_another_shape(kit):
    """The value is right; its gradient has more axes than what it belongs to."""
    return kit.hand_in(
        week="w03_clip", contrastive_loss=BACKWARD.format(result="g.new_ones(3, 4, 5)")
    )


@case(clip_with_loss(2, 1, 1, 0), "", week="w03_clip")
def a_backward_that_ends_the_process(kit):
    return kit.hand_in(
        week="w03_clip", contrastive_loss=BACKWARD.format(result="__import__('os')._exit(7)")
    )


@case(clip_with_loss(2, 1, 1, 0), "", week="w03_clip")
def a_hook_that_raises(kit):
    """The loss is right; whoever takes its gradient meets the student's hook."""
    return kit.hand_in(
        week="w03_clip",
        contrastive_loss="""
        def hook(gradient):
            raise SystemExit("passed")

        def contrastive_loss(logits_NN):
            pairs = torch.arange(len(logits_NN))
            loss = (F.cross_entropy(logits_NN, pairs) + F.cross_entropy(logits_NN.T, pairs)) / 2
            if loss.requires_grad:
                loss.register_hook(hook)
            return loss
        """,
    )


BACKWARD = """
class Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        pairs = torch.arange(len(logits))
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2

    @staticmethod
    def backward(ctx, g):
        return {result}

contrastive_loss = Loss.apply
"""


@case(CLIP, week="w03_clip")
def a_backward_of_ones_own(kit):
    """Honest: a right gradient written by hand counts."""
    return kit.hand_in(
        week="w03_clip",
        contrastive_loss="""
        class Loss(torch.autograd.Function):
            @staticmethod
            def forward(ctx, logits):
                ctx.save_for_backward(logits)
                pairs = torch.arange(len(logits))
                return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2

            @staticmethod
            def backward(ctx, g):
                (logits,) = ctx.saved_tensors
                both = (logits.softmax(dim=1) + logits.softmax(dim=0)) / 2
                return g * (both - torch.eye(len(logits))) / len(logits)

        def contrastive_loss(logits_NN):
            return Loss.apply(logits_NN)
        """,
    )


@case(NOTHING, rf"{UNUSABLE}|^the answer raised|is not defined|^it |^its process")
def classes_that_lie_about_themselves(kit):
    """Answers whose type, name and module are computed, and never the same twice."""
    return kit.hand_in(
        softmax="""
        class Meta(type):
            def __getattribute__(cls, name):
                if name in ("__mro__", "__bases__", "__module__", "__qualname__"):
                    raise KeyError(name)
                return super().__getattribute__(name)
            def __instancecheck__(cls, other): return True
            def __call__(cls, *a, **k): return cls

        class softmax(metaclass=Meta):
            shape = (2, 3, 5)
            def __class_getitem__(cls, item): return cls
        """,
        running_mean="""
        class RunningMean(metaclass=Meta):
            __float__ = lambda self: 4.5
        """,
    )


@case(ONLY_MEAN, WRONG)
def numbers_that_are_nearly_right(kit):
    """Not a number, infinity and negative zero where a share is wanted."""
    return kit.hand_in(softmax=returns("torch.softmax(scores, -1) * float('nan')"))


@case(ONLY_MEAN, LIMIT)
def every_answer_slow(kit):
    """Each call takes two seconds and is right; together they take too long."""
    return kit.hand_in(
        softmax="""
        import time

        def softmax(scores):
            time.sleep(2)
            return torch.softmax(scores, dim=-1)
        """
    )
