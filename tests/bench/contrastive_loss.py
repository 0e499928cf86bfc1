"""The contrastive loss in tiles against the full N × N losses of transformers and open_clip.

Forward and backward, N pairs of E-wide unit vectors. The full losses hold several N × N matrices;
the tiled one holds a few tiles, whatever N is, and pays with one more matrix product.
"""

import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import torch
from _timing import (
    command_line,
    fresh_processes,
    machine,
    milliseconds,
    ratio,
    show,
    spread,
    start,
    take_turns,
    times_as_fast,
    verdict,
    write,
)
from torch import Tensor, nn
from torch.nn import functional as F

from mmlearn.contrastive import tiled_contrastive_loss

FULL = ("transformers", "open_clip")
LOSSES = (*FULL, "mmlearn, tiled")
BAR_PAIRS, MEMORY_BAR, TIME_BAR, FLAT_BAR = 8192, 6.0, 1.0, 1.1
# float32 sums over a few hundred pairs, in another order
TOLERANCE = 1e-5
# What a full loss holds at its peak, in N × N float32 matrices (measured: 4.0 to 5.0).
FULL_MATRICES = 5
MIB = 2**20


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, print and write; `arguments` default to the command line's."""
    parser = command_line(__doc__, "tests/bench/contrastive_loss.py --pairs 1024 8192 --tile 512")
    sizes = [1024, 2048, 4096, 8192, 16384, 32768]
    parser.add_argument("--pairs", type=int, nargs="+", default=sizes, help="N, ascending")
    parser.add_argument("--width", type=int, default=512, help="E")
    parser.add_argument("--tile", type=int, default=1024, help="rows and columns of a tile")
    options = parser.parse_args(arguments)
    device = start(options)
    if min(*options.pairs, options.width, options.tile) < 1:
        sys.exit("--pairs, --width and --tile must be 1 or more")
    if options.quick:
        options.pairs, options.width, options.tile, options.seconds = [256], 32, 64, 0.1

    before = machine(device)
    differences = check_equal(options, device)
    rows = [measure(pairs, options, device) for pairs in sorted(options.pairs)]
    verdicts = judge(rows, options)
    print_tables(rows, verdicts, differences, options)
    write(
        "contrastive_loss",
        options,
        before,
        {"relative_differences": differences, "rows": rows, "verdicts": verdicts},
    )


def loss_function(name: str, tile: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a loss of (image_embeds, text_embeds, scale)."""
    if name == "transformers":
        from transformers.models.clip.modeling_clip import image_text_contrastive_loss

        # The logits are theirs too: CLIPModel.forward's product of texts by images.
        return lambda images, texts, scale: image_text_contrastive_loss(texts @ images.t() * scale)
    if name == "open_clip":
        from open_clip import ClipLoss

        return ClipLoss()
    return lambda images, texts, scale: tiled_contrastive_loss(images, texts, scale, tile)


def random_pairs(pairs: int, options, device) -> tuple[Tensor, Tensor, nn.Parameter]:
    """Return unit vectors in which partners lean towards each other, and a log scale, as leaves."""
    generator = torch.Generator().manual_seed(options.seed)
    images = torch.randn(pairs, options.width, generator=generator)
    texts = images + 2 * torch.randn(pairs, options.width, generator=generator)
    leaves = (F.normalize(x, dim=-1).to(device).requires_grad_() for x in (images, texts))
    return *leaves, nn.Parameter(torch.tensor(math.log(1 / 0.07), device=device))


def forward_backward(loss, inputs) -> Tensor:
    """Return the loss after one forward and backward pass, as in a training step."""
    images, texts, logit_scale = inputs
    for leaf in inputs:
        leaf.grad = None
    value = loss(images, texts, logit_scale.exp())
    value.backward()
    return value.detach()


def check_equal(options, device) -> dict[str, float]:
    """Compare losses and all gradients at a small N that the tile does not divide."""
    tile = 48
    inputs = random_pairs(4 * tile + 7, options, device)
    answers = {}
    for name in LOSSES:
        value = forward_backward(loss_function(name, tile), inputs)
        answers[name] = [value, *(leaf.grad.clone() for leaf in inputs)]
    differences = {}
    for name in FULL:
        for what, ours, theirs in zip(
            ("loss", "gradient of images", "gradient of texts", "gradient of the scale"),
            answers["mmlearn, tiled"],
            answers[name],
            strict=True,
        ):
            difference = float((ours - theirs).norm() / theirs.norm())
            differences[f"{what}, {name}"] = difference
            if not difference <= TOLERANCE:
                sys.exit(
                    f"the tiled loss disagrees with {name}: relative difference of the {what} "
                    f"{difference:.1e}, wanted {TOLERANCE:.0e} or less; nothing was timed"
                )
    return differences


def measure(pairs: int, options, device) -> dict:
    """Return time and peak memory of each loss that fits at this N."""
    row: dict = {"pairs": pairs, "skipped": {}, "peak_bytes": {}, "seconds": {}, "ratio": {}}
    free = free_bytes(device)
    fitting = []
    for name in LOSSES:
        needed = 4 * FULL_MATRICES * pairs**2 if name in FULL else 0
        if needed > 0.8 * free:
            row["skipped"][name] = (
                f"would need about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            )
        else:
            fitting.append(name)
            row["peak_bytes"][name] = peak_bytes_alone(name, pairs, options, device)
    inputs = random_pairs(pairs, options, device)
    losses = {name: loss_function(name, options.tile) for name in fitting}
    contestants = {
        name: lambda loss=loss: forward_backward(loss, inputs) for name, loss in losses.items()
    }
    times = take_turns(contestants, device, options.seconds, options.clock)
    row["seconds"] = {name: spread(values) for name, values in times.items()}
    for name in FULL:
        if name in fitting:
            row["ratio"][name] = ratio(times[name], times["mmlearn, tiled"])
    print(f"N = {pairs:,}: measured {', '.join(fitting)}", flush=True)
    return row


def free_bytes(device: torch.device) -> int:
    """Return the memory that a loss could still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def peak_bytes_alone(name: str, pairs: int, options, device) -> int:
    """Return a loss's peak beyond its inputs; on a CPU, measured in a fresh process."""
    if device.type == "cuda":
        return peak_bytes(name, pairs, options, device)
    fresh = fresh_processes("transformers.models.clip.modeling_clip", "open_clip")
    with ProcessPoolExecutor(1, fresh) as pool:
        try:
            return pool.submit(peak_bytes, name, pairs, options, device).result()
        except BrokenProcessPool:
            sys.exit(f"measuring {name} at N = {pairs:,} was killed: is there too little memory?")


def peak_bytes(name: str, pairs: int, options, device) -> int:
    """Return how far one forward and backward pass rises above what its inputs already take."""
    torch.set_num_threads(options.threads)
    loss = loss_function(name, options.tile)
    # Libraries, threads and workspaces that any first pass sets up are not the loss's.
    forward_backward(loss, random_pairs(16, options, device))
    inputs = random_pairs(pairs, options, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        baseline = torch.cuda.memory_allocated(device)
        forward_backward(loss, inputs)
        return torch.cuda.max_memory_allocated(device) - baseline
    baseline = reset_peak_resident()
    forward_backward(loss, inputs)
    return max(1, peak_resident() - baseline)


def reset_peak_resident() -> int:
    """Return the memory now resident; on Linux, also make it the new peak."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return psutil.Process().memory_info().rss


def peak_resident() -> int:
    """Return the most memory that was resident at once, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line.split() for line in status.read_text("utf-8").splitlines())
        return 1024 * next(int(line[1]) for line in lines if line[0] == "VmHWM:")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def beyond_gradients(row: dict, name: str, width: int) -> int:
    """Return the peak less the gradients of the two inputs, which every loss must return."""
    return row["peak_bytes"][name] - 2 * 4 * row["pairs"] * width


def judge(rows: list[dict], options) -> list[dict]:
    """Hold the rows against the bars of shared sizes; at other sizes there is no verdict."""
    tiled, verdicts = "mmlearn, tiled", []
    for row in rows:
        if row["pairs"] != BAR_PAIRS or not row["ratio"]:
            continue
        least = min(row["peak_bytes"][name] for name in row["ratio"]) / row["peak_bytes"][tiled]
        slowest = min(values["median"] for values in row["ratio"].values())
        at = f"at N = {BAR_PAIRS:,}, against the better full loss"
        verdicts += [
            {"what": f"times less memory {at}", "value": least, "bar": MEMORY_BAR},
            {"what": f"times as fast {at}", "value": slowest, "bar": TIME_BAR},
        ]
    for entry in verdicts:
        entry["verdict"] = verdict(entry["value"], entry["bar"])
    # Below two tiles a side the whole matrix is as small as what the tiles need.
    many = [row for row in rows if row["pairs"] >= 2 * options.tile]
    if len(many) > 1 and not options.quick:
        first, last = (beyond_gradients(row, tiled, options.width) for row in (many[0], many[-1]))
        growth = last / first
        ends = f"from N = {many[0]['pairs']:,} to {many[-1]['pairs']:,}"
        lacks = round(growth, 2) - FLAT_BAR
        verdicts.append(
            {
                "what": f"growth of the tiled loss's memory {ends}, inputs and gradients apart",
                "value": growth,
                "bar": FLAT_BAR,
                "verdict": "PASS" if lacks <= 0 else f"over its bar by {lacks:.2f}",
            }
        )
    return verdicts


def print_tables(rows: list[dict], verdicts: list[dict], differences: dict, options) -> None:
    """Print time, memory and verdicts."""
    times, memory = [], []
    for row in rows:
        skipped = dict.fromkeys(row["skipped"], "does not fit")
        shown = {name: milliseconds(values) for name, values in row["seconds"].items()} | skipped
        faster = {name: times_as_fast(values) for name, values in row["ratio"].items()}
        pairs = f"{row['pairs']:,}"
        times.append([pairs, *map(shown.get, LOSSES), *(faster.get(name, "") for name in FULL)])
        peaks = {name: f"{value / MIB:,.1f}" for name, value in row["peak_bytes"].items()} | skipped
        beyond = beyond_gradients(row, "mmlearn, tiled", options.width) / MIB
        less = [
            f"{row['peak_bytes'][name] / row['peak_bytes']['mmlearn, tiled']:.1f}"
            if name in row["peak_bytes"]
            else ""
            for name in FULL
        ]
        memory.append([pairs, *map(peaks.get, LOSSES), f"{beyond:,.1f}", *less])
    worst = max(differences.values())
    show(
        f"Contrastive loss, E = {options.width}, forward + backward: milliseconds",
        ["N", *LOSSES, "times as fast as transformers", "as open_clip"],
        times,
        "median (quartiles); ratios are taken round by round. Before timing, losses and gradients "
        f"agreed to {worst:.1e} (relative).",
    )
    show(
        "Contrastive loss: peak memory beyond the inputs, MiB",
        ["N", *LOSSES, "tiled, gradients apart", "times less than transformers", "than open_clip"],
        memory,
        f"tiles of {options.tile} × {options.tile}; each number from a fresh process on a CPU. "
        "The peak holds the gradients of the inputs, 2 N E numbers, which no loss can spare.",
    )
    for row in rows:
        for name, why in row["skipped"].items():
            print(f"N = {row['pairs']:,}: {name} left out: {why}")
    for entry in verdicts:
        print(f"{entry['what']}: {entry['value']:.2f}, bar {entry['bar']:g}: {entry['verdict']}")
    if not verdicts:
        print(f"no verdict: the bars are set at N = {BAR_PAIRS:,} and over several N")


if __name__ == "__main__":
    main()
