"""Memory and time to prepare and to read a large text: `moa data tokens`, then some steps of `moa fit` on its files.

    python benchmarks/large_text.py --gigabytes 10 [--tokenizer tokenizer.json] [--folder DIR] [--out FILE]

Everything is done twice, with a tenth of the text and with all of it, so that what grows with the text shows: peaks of
resident memory are those of each command as a process of its own. The text is the standard library's files over and
over, in changing order and each under a line that numbers it, as JSON lines in files of a gigabyte. It needs about
three times its size on disk with bytes (two bytes a token), and leaves nothing behind.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from data.documents import stdlib_documents
from moa_lightning.environment import device_name

GIGABYTE, FILE = 10**9, 10**9
STEPS = 20
FIT = ["-c", "configs/language/gpt_tiny.yaml", "-c", "configs/data/token_files.yaml", "-c", "configs/ffn/moa.yaml"]
RUN = ["--model.gpt.dim=64", "--data.context_length=1024", "--data.batch_size=2", "--data.max_val_samples=2"]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of text")
    parser.add_argument("--tokenizer", default="bytes", help="bytes or a tokenizer.json")
    parser.add_argument("--folder", type=Path, help="where the files lie meanwhile (default: the system's for such)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    rows = []
    for share in (0.1, 1.0):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rows.append(measured(Path(folder), options.gigabytes * share, options.tokenizer))
        print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        result = {
            "device": f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores",
            "tokenizer": Path(options.tokenizer).name,
            "sizes": rows,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def measured(folder: Path, gigabytes: float, tokenizer: str) -> dict[str, Any]:
    """Seconds and peaks (MB) of both commands on a text of so many gigabytes."""
    text, tokens, run = folder / "text", folder / "tokens", folder / "run"
    text.mkdir()
    size = write_text(text, round(gigabytes * GIGABYTE))
    prepared = timed(["data", "tokens", "--source", str(text), "--tokenizer", tokenizer, "--out", str(tokens)])
    shutil.rmtree(text)
    description = json.loads((tokens / "tokens.json").read_text())
    count = sum(part["tokens"] for part in description["splits"].values())
    length = [f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={STEPS}"]
    read = timed(["fit", *FIT, *RUN, *length, f"--data.source={tokens}", f"--run_dir={run}"])
    return {
        "gigabytes": round(size / GIGABYTE, 3),
        "tokens": count,
        "windows_of_1024": count // 1024,
        "prepare_seconds": prepared[0],
        "prepare_megabytes_per_second": round(size / 1e6 / prepared[0], 2),
        "prepare_peak_megabytes": prepared[1],
        "fit_seconds": read[0],
        "fit_peak_megabytes": read[1],
    }


def write_text(folder: Path, size: int) -> int:
    """Bytes of documents written, as JSON lines, at least `size`."""
    documents = [document.content.decode(errors="replace") for document in stdlib_documents()]
    order, written, number = random.Random(0), 0, 0
    while written < size:
        with (folder / f"{number:06d}.jsonl").open("w") as file:
            begun = written
            while written < size and written - begun < FILE:
                for text in order.sample(documents, len(documents)):
                    number += 1
                    text = f"# {number}\n{text}"
                    file.write(json.dumps({"text": text}) + "\n")
                    written += len(text.encode())
    return written


def timed(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak of resident memory, MB, of `moa ARGUMENTS`."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "moa_lightning.cli", *arguments], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"moa {arguments[0]} failed")
    return round(time.perf_counter() - begun, 1), round(used.ru_maxrss * 1024 / 1e6)


if __name__ == "__main__":
    main(sys.argv[1:])
