"""What the benches share: fair timing, verdicts, tables, and a record of the machine.

A bench is a plain script. It proves that its contestants compute the same thing, times them in
turns, prints a table, and writes build/bench/NAME.json. No test asserts a timing.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmlearn.train import choose_device

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("transformers", "open_clip_torch", "accelerate", "numpy")
FEWEST_ROUNDS, MOST_ROUNDS = 5, 101


def command_line(description: str, example: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every bench has."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"example: python {example}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for each contestant")
    parser.add_argument("--seconds", type=float, default=20, help="timing budget of one row")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time, fair on a busy machine together with --threads 1",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the bench still run")
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "bench", help="folder of JSON")
    return parser


def start(options: argparse.Namespace) -> torch.device:
    """Set threads and seed, and return the device; leave with one sentence where it is absent."""
    if options.threads < 1 or options.seconds <= 0:
        sys.exit(
            f"--threads {options.threads} --seconds {options.seconds:g}: give at least one thread "
            "and a budget above 0 seconds"
        )
    if options.clock == "cpu" and options.device != "cpu":
        sys.exit(f"--clock cpu sees nothing of what --device {options.device} does; use wall")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    try:
        return choose_device(options.device)
    except ValueError as error:
        sys.exit(str(error))


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Time the contestants in turns, A B A B, and return each one's seconds per round.

    A busy neighbour or a changing clock then slows all of them alike, and the ratio within a round
    stays fair. Who goes first moves on by one each round. Between 5 and 101 rounds, until the
    budget is spent, after two rounds that do not count.
    """
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(2):
        for run in contestants.values():
            once(run, device, clock)
    collecting = gc.isenabled()
    gc.disable()
    started = time.perf_counter()
    try:
        for turn in range(MOST_ROUNDS):
            if turn >= FEWEST_ROUNDS and time.perf_counter() - started > seconds:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(once(contestants[name], device, clock))
    finally:
        if collecting:
            gc.enable()
    return times


def once(run: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    """Return the seconds of one call, until the device has finished it."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    finish(device)
    started = now()
    run()
    finish(device)
    return now() - started


def finish(device: torch.device) -> None:
    """Wait for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def fresh_processes(*libraries: str) -> multiprocessing.context.BaseContext:
    """Return a way to start processes in which nothing has been computed yet.

    Where the system can, a server imports the libraries once and each process forks from it, in
    milliseconds; elsewhere each imports them anew.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["torch", *libraries])
    return context


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the quartles around it, the least, and how many there were."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": middle,
        "low_quartile": low,
        "high_quartile": high,
        "least": min(values),
        "rounds": len(values),
    }


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict[str, float]:
    """Return how many times as long the first took, compared round by round."""
    return spread([a / b for a, b in zip(slower, faster, strict=True)])


def verdict(value: float, bar: float) -> str:
    """Say whether the value reaches the bar, both rounded to two places; if not, what it lacks."""
    lacks = bar - round(value, 2)
    return "PASS" if lacks <= 0 else f"short of its bar by {lacks:.2f}"


def milliseconds(seconds: Mapping[str, float]) -> str:
    """Write a spread of seconds as "median (quartile–quartile)" in milliseconds."""
    values = [1000 * seconds[key] for key in ("median", "low_quartile", "high_quartile")]
    digits = 0 if values[0] >= 100 else 1 if values[0] >= 10 else 2
    middle, low, high = (f"{value:,.{digits}f}" for value in values)
    return f"{middle} ({low}–{high})"


def times_as_fast(values: Mapping[str, float]) -> str:
    """Write a spread of ratios as "median (quartile–quartile)"."""
    return "{median:.2f} ({low_quartile:.2f}–{high_quartile:.2f})".format(**values)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Print a table; columns whose head starts with "<" are set flush left, the others right."""
    table = Table(title=title, caption=note or None, title_justify="left", caption_justify="left")
    for column in columns:
        justify = "left" if column.startswith("<") else "right"
        table.add_column(column.removeprefix("<"), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row)
    # Piped into a file or a log, a table keeps its width instead of breaking at 80 characters.
    Console(width=None if sys.stdout.isatty() else 132).print(table)


def machine(device: torch.device) -> dict[str, object]:
    """Return what a reader needs in order to compare: hardware, versions, and how busy it was."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "load_average_1_minute": load,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # with its build: +cpu, +cu130
        **{name: version(name) for name in LIBRARIES},
    }


def write(name: str, options: argparse.Namespace, before: Mapping, results: Mapping) -> None:
    """Write build/bench/NAME.json: what was asked, on which machine, and every result."""
    given = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    record = {
        "bench": name,
        "options": {key: value for key, value in given.items() if key != "to"},
        "machine": {**before, "load_average_at_the_end": load},
        **results,
    }
    options.to.mkdir(parents=True, exist_ok=True)
    path = options.to / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    part.replace(path)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    start_load = before["load_average_1_minute"]
    busy = "" if load is None else f"; load average {start_load:.1f} before, {load:.1f} after"
    print(f"written: {shown} ({before['cpu_count']} CPUs, {before['threads']} threads{busy})")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
