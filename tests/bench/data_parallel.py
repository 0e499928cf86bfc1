"""CLIP on two processes (accelerate, gloo, loopback) against one with the same global batch.

The two must take the same step: features are gathered with their gradient, so each image still
meets every negative of the global batch. What the step then costs is timed in turns. This bench
runs on the CPU: it is about the exchange between processes.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection

import numpy as np
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
    write,
)
from torch import Tensor

from mmlearn.clip import CLIP, CLIPConfig, TextConfig, VisionConfig
from mmlearn.contrastive import contrastive_loss
from mmlearn.train import gather_with_gradient, set_seed

WORLD = 2
GRADIENT_BAR = 1e-5
# Nobody waits for ever on a process that was killed.
PATIENCE_SECONDS = 600


def main(arguments: list[str] | None = None) -> None:
    """Check, time, print and write; `arguments` default to the command line's."""
    parser = command_line(__doc__, "tests/bench/data_parallel.py --batches 64 256 --width 256")
    parser.set_defaults(threads=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 512], help="global")
    parser.add_argument("--width", type=int, default=128, help="d_model of both towers")
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args(arguments)
    if options.device != "cpu":
        print(f"--device {options.device}: this bench measures gloo processes and stays on the CPU")
        options.device = "cpu"
    if options.clock == "cpu":
        sys.exit("--clock cpu does not see the processor time of the other process; use wall")
    if min(options.layers, options.width // 32, *options.batches) < 1 or options.width % 32:
        sys.exit("--batches and --layers must be 1 or more, --width a multiple of 32")
    if any(batch % WORLD for batch in options.batches):
        sys.exit(f"--batches {options.batches}: each must divide by {WORLD} processes")
    if options.quick:
        options.batches, options.width, options.layers, options.seconds = [8], 32, 1, 0.1
    device = start(options)

    before = machine(device)
    config = tiny(options)
    single = {batch: Training(config, batch, options.seed) for batch in options.batches}
    rows = []
    with Processes(config, options) as processes:
        for batch in options.batches:
            rows.append(compare(single[batch], processes, batch, device, options))
            print(f"global batch {batch}: {rows[-1]['verdict']}", flush=True)
    print_table(rows, options)
    write("data_parallel", options, before, {"config": asdict(config), "rows": rows})


def tiny(options) -> CLIPConfig:
    """Return the sizes of a CLIP that a CPU trains in milliseconds."""
    sizes = {
        "d_model": options.width,
        "num_layers": options.layers,
        "num_heads": options.width // 32,
        "d_ff": 4 * options.width,
    }
    vision = VisionConfig(image_size=32, patch_size=8, **sizes)
    text = TextConfig(vocab_size=512, max_length=16, eos_token_id=511, **sizes)
    return CLIPConfig(vision, text, embed_dim=options.width)


class Training:
    """A model, its share of a batch, and the step; `accelerator` joins it to other processes."""

    def __init__(self, config: CLIPConfig, batch: int, seed: int, accelerator=None):
        set_seed(seed)
        self.model = CLIP(config).train()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.wrapped, self.optimizer, self.accelerator = self.model, optimizer, accelerator
        images, input_ids = random_batch(config, batch, seed)
        if accelerator:
            self.wrapped, self.optimizer = accelerator.prepare(self.model, optimizer)
            rank, world = accelerator.process_index, accelerator.num_processes
            images, input_ids = (x.chunk(world)[rank] for x in (images, input_ids))
        self.batch = images, input_ids

    def backward(self) -> None:
        """Compute the gradients of the global batch."""
        self.optimizer.zero_grad(set_to_none=True)
        out = self.wrapped(*self.batch)
        embeds = (gather_with_gradient(x) for x in (out.image_embeds, out.text_embeds))
        loss = contrastive_loss(*embeds, out.scale)
        self.accelerator.backward(loss) if self.accelerator else loss.backward()

    def step(self) -> None:
        """Train once."""
        self.backward()
        self.optimizer.step()

    def gradients(self) -> np.ndarray:
        """Return the gradient of the next step over all parameters, without taking the step."""
        self.backward()
        return np.concatenate([p.grad.flatten().numpy() for p in self.model.parameters()])


def random_batch(config: CLIPConfig, batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noise images and random texts, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    vision, text = config.vision, config.text
    shape = (batch, vision.num_channels, vision.image_size, vision.image_size)
    images = torch.randn(shape, generator=generator)
    ids = torch.randint(text.eos_token_id, (batch, text.max_length), generator=generator)
    ids[:, -1] = text.eos_token_id
    return images, ids


class Processes:
    """Two worker processes that do as they are told, each call at the same time in both."""

    def __init__(self, config: CLIPConfig, options):
        context = fresh_processes("accelerate")
        port = free_port()
        self.pipes, self.workers = [], []
        for rank in range(WORLD):
            here, there = context.Pipe()
            arguments = (rank, port, there, config, options)
            worker = context.Process(target=work, args=arguments, daemon=True)
            worker.start()
            there.close()
            self.pipes.append(here)
            self.workers.append(worker)

    def __enter__(self) -> "Processes":
        return self

    def call(self, method: str, batch: int):
        """Have all processes run a method of their `Training`; return what the first returns."""
        answers = []
        for pipe in self.pipes:
            pipe.send((method, batch))
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE_SECONDS):
                sys.exit(f"process {rank} gave no answer for {PATIENCE_SECONDS} s; stopping")
            try:
                ok, answer = pipe.recv()
            except EOFError:
                sys.exit(f"process {rank} ended without an answer; was it killed?")
            if not ok:
                sys.exit(f"process {rank} failed:\n{answer}")
            answers.append(answer)
        return answers[0]

    def __exit__(self, *_) -> None:
        for pipe in self.pipes:
            pipe.close()  # the worker's loop ends here
        for worker in self.workers:
            worker.join(20)
            if worker.is_alive():
                worker.kill()


def work(rank: int, port: int, pipe: Connection, config: CLIPConfig, options) -> None:
    """One process: join the group, then obey the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(options.threads)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD),
        LOCAL_WORLD_SIZE=str(WORLD),
        OMP_NUM_THREADS=str(options.threads),
    )
    loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
    if loopback:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback.pop()
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(cpu=True)
        trainings: dict[int, Training] = {}
        while True:
            try:
                method, batch = pipe.recv()
            except EOFError:
                break
            if batch not in trainings:
                trainings[batch] = Training(config, batch, options.seed, accelerator)
            pipe.send((True, getattr(trainings[batch], method)()))
        accelerator.end_training()
    except Exception:
        pipe.send((False, traceback.format_exc()))


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def compare(single: Training, processes: Processes, batch: int, device, options) -> dict:
    """Return how far the gradients are apart at the first step, and the time of a step."""
    whole, shared = single.gradients(), processes.call("gradients", batch)
    relative = float(np.linalg.norm(shared - whole) / np.linalg.norm(whole))

    def alone(threads: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(threads)
            single.step()

        return run

    contestants = {
        "1 process": alone(options.threads),
        "1 process, all threads": alone(WORLD * options.threads),
        "2 processes": lambda: processes.call("step", batch),
    }
    times = take_turns(contestants, device, options.seconds)
    torch.set_num_threads(options.threads)
    return {
        "global_batch": batch,
        "relative_difference_of_gradients": relative,
        "largest_difference_of_gradients": float(np.abs(shared - whole).max()),
        "largest_gradient": float(np.abs(whole).max()),
        "bar": GRADIENT_BAR,
        "verdict": (
            "PASS" if relative <= GRADIENT_BAR else f"over its bar by {relative - GRADIENT_BAR:.1e}"
        ),
        "seconds": {name: spread(values) for name, values in times.items()},
        "scaling": ratio(times["1 process"], times["2 processes"]),
        "against_threads": ratio(times["1 process, all threads"], times["2 processes"]),
    }


def print_table(rows: list[dict], options) -> None:
    """Print the gradients' agreement and the scaling of a step."""
    lines = []
    for row in rows:
        seconds = {name: milliseconds(values) for name, values in row["seconds"].items()}
        lines.append(
            [
                str(row["global_batch"]),
                f"{row['relative_difference_of_gradients']:.1e}",
                f"{row['largest_difference_of_gradients']:.0e} of {row['largest_gradient']:.0e}",
                row["verdict"],
                *seconds.values(),
                times_as_fast(row["scaling"]),
                times_as_fast(row["against_threads"]),
            ]
        )
    threads = options.threads
    show(
        "Data parallel CLIP: the same global batch on 1 and on 2 processes",
        [
            "global batch",
            "gradients apart",
            "at most",
            f"<bar {GRADIENT_BAR:.0e}",
            f"1 process × {threads}, ms",
            f"1 × {WORLD * threads}, ms",
            f"2 × {threads}, ms",
            "speed-up over 1 process",
            f"over 1 × {WORLD * threads}",
        ],
        lines,
        "milliseconds a step (forward, exchange of features, backward with exchange of gradients, "
        "AdamW): median (quartiles), on processes × threads. Gradients apart: norm of the "
        "difference over the norm; at most: the largest difference, beside the largest gradient.",
    )


if __name__ == "__main__":
    main()
