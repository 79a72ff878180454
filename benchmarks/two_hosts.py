"""Train on two hosts, cut one off in the middle of an epoch, and compare the result with one machine's.

The hosts are network namespaces of Linux with a virtual cable between them (root is needed, and the program `ip`).
Each runs `torchrun --nnodes 2` with a c10d rendezvous; gradients travel by gloo over the cable. They share the run
folder, as hosts of a cluster share a file system.

1. one machine, two processes: what the result must be;
2. two hosts with a process each;
3. the same, and in mid-epoch the second host's cable is pulled and the host restarts: its processes are killed, the
   cable is plugged in again, torchrun starts anew. The first host's torchrun stays, and both resume from last.ckpt.

    python benchmarks/two_hosts.py --csv benchmarks/results/two_hosts.csv
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from parameternet import files
from parameternet.training import CheckpointError, Recipe
from parameternet.training.checkpoint import BEST, load_last

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = ("192.0.2.1", "192.0.2.2")  # RFC 5737: for examples, in use nowhere
CABLE = "cable0"  # the interface's name in both hosts
PORT = 29400
PATIENCE = 240.0  # seconds for any step of this program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--csv", type=Path, help="write the table there, too")
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(f"two hosts cannot be made: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), arguments.epochs, undisturbed=True)
    print(table(rows))
    if arguments.csv:
        files.write_text(arguments.csv, table(rows))
    sys.exit(0 if all_well(rows) else 1)


def why_not() -> str | None:
    """Why network namespaces cannot be made here; None if they can."""
    if sys.platform != "linux":
        return "network namespaces are a feature of Linux"
    if shutil.which("ip") is None:
        return "the program `ip` is not installed (package iproute2)"
    try:
        with Cable():
            return None
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


class Cable:
    """Two hosts and a cable between them; leaving the block removes all of it, and what still runs there."""

    def __init__(self):
        self.hosts = tuple(f"parameternet-{os.getpid()}-{i}" for i in (1, 2))

    def __enter__(self) -> Cable:
        try:
            for host in self.hosts:
                ip("netns", "add", host)
                ip("-n", host, "link", "set", "lo", "up")
            ip("-n", self.hosts[0], "link", "add", CABLE, "type", "veth", "peer", CABLE, "netns", self.hosts[1])
            for host, address in zip(self.hosts, ADDRESSES, strict=True):
                ip("-n", host, "address", "add", f"{address}/24", "dev", CABLE)
                ip("-n", host, "link", "set", CABLE, "up")
                # A lost connection is given up after a second, not after a quarter of an hour.
                self.run(host, "sh", "-c", "echo 3 > /proc/sys/net/ipv4/tcp_retries2")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            with suppress(subprocess.CalledProcessError):
                end_all(host)
                ip("netns", "delete", host)

    def run(self, host: str, *command: str) -> None:
        ip("netns", "exec", host, *command)

    def pull(self) -> None:
        """Cut the second host off."""
        ip("-n", self.hosts[1], "link", "set", CABLE, "down")

    def plug(self) -> None:
        """Connect the second host again."""
        ip("-n", self.hosts[1], "link", "set", CABLE, "up")


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


# ------------------------------------------------------------------------------------------------------------- runs


def measure(root: Path, epochs: int, undisturbed: bool) -> list[dict[str, object]]:
    """A row for each run of the table; the first is the reference."""
    draw_images(root / "images")
    write_recipe(root, epochs)
    with Cable() as cable:
        on_one_machine(cable, root / "one")
        rows = [describe("one machine, 2 processes", root / "one", root / "one", None)]
        if undisturbed:
            on_two_hosts(cable, root / "two", cut=False)
            rows.append(describe("two hosts, a process each", root / "two", root / "one", None))
        at = on_two_hosts(cable, root / "cut", cut=True)
        rows.append(describe("two hosts, one cut off", root / "cut", root / "one", at))
    return rows


def draw_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (folder / name).mkdir(parents=True)
        for i in range(32):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def write_recipe(root: Path, epochs: int) -> None:
    recipe = Recipe(
        model="test_efficientnet", train=str(root / "images"), val=str(root / "images"), input_size=32, batch_size=8,
        epochs=epochs, lr=1e-3, mixup=0.2, cutmix=0.5, reprob=0.3, color_jitter=0.2, drop_rate=0.2, drop_path_rate=0.1,
        ema_decay=0.9, workers=0, threads=1, checkpoint_minutes=0, device="cpu",
    )  # fmt: skip
    files.write_text(root / "recipe.yaml", recipe.to_yaml())


def start(cable: Cable, host: int, folder: Path, *arguments: str, interface: str = CABLE) -> subprocess.Popen:
    """Start torchrun on a host."""
    command = ["ip", "netns", "exec", cable.hosts[host], sys.executable, "-m", "torch.distributed.run", *arguments]
    command += ["-m", "parameternet.cli.train", str(folder.parent / "recipe.yaml"), "--output", str(folder)]
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {"PYTHONPATH": search, "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
    # torchrun announces the store that it shares with its workers once; a host that joins later would wait for it.
    variables |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(folder.with_name(f"{folder.name}-{host}.log"), "ab") as log:
        return subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=log, stderr=log, start_new_session=True
        )


def on_one_machine(cable: Cable, folder: Path) -> None:
    arguments = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    finish(start(cable, 0, folder, *arguments, interface="lo"), folder)


def on_two_hosts(cable: Cable, folder: Path, cut: bool) -> int | None:
    """Train on both hosts. With `cut`, the second one is cut off and starts again; returns the update at which."""

    def torchrun(host: int) -> subprocess.Popen:
        patience = "join_timeout=120,last_call_timeout=1,read_timeout=20,keep_alive_interval=1,keep_alive_max_attempt=3"
        arguments = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--monitor-interval", "0.1"]
        arguments += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-id", folder.name]
        arguments += ["--rdzv-conf", f"is_host={1 - host},{patience}", "--local-addr", ADDRESSES[host]]
        return start(cable, host, folder, *arguments)

    first, second = torchrun(0), torchrun(1)
    at = None
    if cut:
        at = wait_for_mid_epoch(folder, (first, second))
        cable.pull()
        time.sleep(1)  # the first host notices by itself, or when the second one is back
        end_all(cable.hosts[1])  # the second host loses power
        second.wait()
        cable.plug()
        second = torchrun(1)
    finish(first, folder)
    finish(second, folder)
    return at


def end_all(host: str) -> None:
    """Kill every process of a host, by its id."""
    for process in ip("netns", "pids", host).split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def wait_for_mid_epoch(folder: Path, processes: tuple[subprocess.Popen, ...]) -> int:
    """Wait until `last.ckpt` is of the middle of the second epoch; returns its update."""
    for _ in patiently("the second epoch"):
        if any(process.poll() is not None for process in processes):
            raise RuntimeError(f"a host ended before it was cut off:\n{logs(folder)}")
        with suppress(CheckpointError):
            progress = json.loads(load_last(folder)["progress"])
            if progress["epoch"] == 1 and progress["step"] >= 2:
                return progress["updates"]
    raise AssertionError


def finish(process: subprocess.Popen, folder: Path) -> None:
    for _ in patiently("the end of a run", folder):
        if process.poll() is not None:
            break
    if process.returncode:
        raise RuntimeError(f"torchrun ended with {process.returncode}:\n{logs(folder)}")


def patiently(what: str, folder: Path | None = None) -> Iterator[None]:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        yield
        time.sleep(0.02)
    raise TimeoutError(f"{what} did not come in {PATIENCE:.0f} s\n{logs(folder) if folder else ''}")


def logs(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-6000:] for path in sorted(folder.parent.glob("*.log")))


# ------------------------------------------------------------------------------------------------------------ table


def describe(title: str, folder: Path, reference: Path, cut_at: int | None) -> dict[str, object]:
    mine, theirs = load_last(folder), load_last(reference)
    pairs = [(mine[part][name], theirs[part][name]) for part in ("model", "ema") for name in theirs[part]]
    progress = json.loads(mine["progress"])
    log = "".join(path.read_text(errors="replace") for path in folder.parent.glob(f"{folder.name}-*.log"))
    row = progress["rows"][-1]
    return {
        "run": title,
        "cut_off_at_update": cut_at,
        "resumed": log.count(RESUMED),
        "updates": progress["updates"],
        "images_validated": row["images"],
        "train_loss": f"{row['train_loss']:.6f}",
        "val_loss": f"{row['val_loss']:.6f}",
        "tensors": len(pairs),
        "bitwise_equal": sum(torch.equal(a, b) for a, b in pairs),
        "best_file_equal": (folder / BEST).read_bytes() == (reference / BEST).read_bytes(),
    }


RESUMED = "resuming from epoch"


def table(rows: list[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(files.CsvFile(text), rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def all_well(rows: list[dict[str, object]]) -> bool:
    reference, cut = rows[0], rows[-1]
    same = all(row["bitwise_equal"] == row["tensors"] and row["best_file_equal"] for row in rows)
    return same and all(row["updates"] == reference["updates"] for row in rows) and cut["resumed"] >= 1


if __name__ == "__main__":
    main()
