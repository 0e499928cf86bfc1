"""Honest noise: what a diligent student's notebook does besides. It costs nothing."""

from .kit import FULL, collector

CASES, case = collector("honest noise")


@case(FULL)
def writes_to_stderr(kit):
    return kit.hand_in(
        first="""
        import logging
        import sys
        import warnings

        print("to stderr", file=sys.stderr)
        warnings.warn("be careful", stacklevel=1)
        logging.getLogger("student").error("an error in the log")
        """,
        softmax="""
        import sys
        import warnings

        def softmax(scores):
            print("softmax of", scores.shape, file=sys.stderr)
            print("softmax of", scores.shape)
            warnings.warn("still careful", stacklevel=1)
            return torch.softmax(scores, dim=-1)
        """,
    )


@case(FULL)
def prints_odd_characters(kit):
    """Half a character, control characters, colours, and every script."""
    return kit.hand_in(
        first=r"""
        print("\ud83d half", "\0 \x07 \x1b[31m red \x1b[0m", "عربي 中文 ✓ é")
        import sys
        sys.stdout.write("no newline\r\rnor here")
        sys.stderr.flush()
        naïve_Größe = 3
        "\udcff"
        """
    )


@case(FULL)
def shows_progress(kit):
    return kit.hand_in(
        first="""
        from tqdm import tqdm
        from tqdm.auto import tqdm as rich_tqdm

        for _ in tqdm(range(500)):
            pass
        for _ in rich_tqdm(range(50)):
            pass
        for step in range(500):
            print(f"step {step}", end="\\r")
        """
    )


@case(FULL)
def draws_figures(kit):
    return kit.hand_in(
        first="""
        import matplotlib.pyplot as plt
        from IPython.display import display

        figure, axes = plt.subplots()
        axes.plot([1, 2, 3])
        plt.show()
        display(figure)
        plt.plot([3, 2, 1])
        """
    )


@case(FULL)
def shows_widgets(kit):
    return kit.hand_in(
        first="""
        import ipywidgets
        from IPython.display import HTML, Javascript, Markdown, display

        display(ipywidgets.IntSlider(3), HTML("<b>bold</b>"), Markdown("*text*"), Javascript("1"))
        ipywidgets.interact(lambda x: x, x=(0, 3))
        """
    )


@case(FULL)
def uses_magics(kit):
    return kit.hand_in(
        first="""
        %matplotlib inline
        %config InlineBackend.figure_format = "retina"
        %load_ext autoreload
        %autoreload 2
        %time sum(range(1000))
        %env MINE=1
        !echo from the shell
        files = !ls
        %whos
        scores?
        """,
        between="%%timeit -n 1 -r 1\nsoftmax(scores)",
        last="%%bash\necho from bash\nexit 3",
    )


@case(FULL)
def installs_a_package(kit):
    """There is no network: the cell fails, quickly, and nothing else does."""
    return kit.hand_in(first="%pip install -q --retries 0 --timeout 1 nothing-of-this-name")


@case(FULL)
def writes_a_module_and_imports_it(kit):
    return kit.edited(
        lambda data: data["cells"].insert(
            3,
            {
                "cell_type": "code",
                "id": "helper",
                "metadata": {},
                "source": "%%writefile helper.py\ndef shifted(x):\n    return x - x.max()",
                "outputs": [],
                "execution_count": 1,
            },
        ),
        softmax="""
        from helper import shifted

        def softmax(scores):
            return torch.softmax(shifted(scores), dim=-1)
        """,
    )


@case(FULL)
def fails_elsewhere(kit):
    """Cells that stop with errors, some of them odd, above and below the answers."""
    return kit.hand_in(
        first="1 / 0",
        between="raise SystemExit('enough')",
        last="class Odd(Exception):\n    def __str__(self):\n        raise self\n\nraise Odd",
    )


@case(FULL)
def does_not_parse_elsewhere(kit):
    return kit.hand_in(first="def broken(:", last="    indented = 1\n\tand a tab")


@case(FULL)
def awaits(kit):
    return kit.hand_in(
        first="""
        import asyncio

        await asyncio.sleep(0.01)
        task = asyncio.create_task(asyncio.sleep(60))
        """
    )


@case(FULL, shown=r"worked \[\[0, 1, 2, 3\], \[4, 5, 6, 7\]\] \[1, 2\]")
def works_in_processes(kit):
    """Two workers, as a loader of data has them, and a thread pool."""
    return kit.hand_in(
        first="""
        from concurrent.futures import ThreadPoolExecutor
        from torch.utils.data import DataLoader

        batches = list(DataLoader(list(range(8)), batch_size=4, num_workers=2))
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(abs, [-1, -2]))
        print("worked", [batch.tolist() for batch in batches], found)
        """
    )


@case(FULL)
def computes_in_parallel(kit):
    """torch on many threads, in a process that was forked."""
    return kit.hand_in(
        first="""
        torch.set_num_threads(4)
        assert torch.randn(600, 600).mm(torch.randn(600, 600)).shape == (600, 600)
        """
    )


@case(FULL)
def seeds_everything(kit):
    """Its own seeds and settings, also while it answers."""
    return kit.hand_in(
        first="torch.manual_seed(1)\ntorch.set_default_dtype(torch.float32)",
        softmax="""
        import random

        import numpy as np

        def softmax(scores):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            torch.randn(3)
            return torch.softmax(scores, dim=-1)
        """,
    )


@case(FULL)
def answers_in_its_own_style(kit):
    """Decorated, annotated, partial, a callable object, and nested functions."""
    return kit.hand_in(
        softmax="""
        from __future__ import annotations

        import functools
        from dataclasses import dataclass

        @dataclass(frozen=True)
        class Softmax:
            dim: int = -1

            @functools.cached_property
            def function(self):
                return functools.partial(torch.nn.functional.softmax, dim=self.dim)

            def __call__(self, scores: torch.Tensor) -> torch.Tensor:
                return self.function(scores)

        softmax = Softmax()
        """,
        running_mean="""
        class Base(nn.Module):
            def __init__(self):
                super().__init__()
                self.values = []

        class RunningMean(Base):
            @torch.no_grad()
            def forward(self, value: float):
                if value != value or abs(value) == float("inf"):
                    raise ValueError("give a finite number")
                self.values.append(value)
                return sum(self.values) / len(self.values)
        """,
    )
