"""Training tokens per second: `moa fit` against nanoGPT's train.py, in turns, same shapes and precision.

    python benchmarks/nanogpt.py --repo PATH [--precision bf16-mixed] [--threads 2]

PATH is a checkout of nanoGPT, whose train.py runs as it is, but for the clock, which it reads once a step: that takes
the turns. In bf16-mixed it also opens its autocast on a CPU, where it has none by itself. Both trainers read the bytes
of Python's standard library, and neither validates or saves during a turn. nanoGPT's stock setting for CPUs (float32,
not compiled) runs beside the compiled one.
"""

import argparse
import json
import os
import pickle
import runpy
import shutil
import statistics
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from turns import Program, Turn, fit, measure

HERE = Path(__file__).resolve().parent
FILES = ("train.py", "model.py", "configurator.py")
STEPS, ROUNDS = 3, 7
NO_AUTOCAST = "ctx = nullcontext() if device_type == 'cpu' else "
FFNS = ("gelu", "la", "moa", "swiglu", "moa_gated_both")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repo", type=Path, required=True, help="checkout of nanoGPT")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ffn", nargs="+", choices=FFNS, default=["gelu", "moa"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    for name in FILES:
        if not (options.repo / name).exists():
            sys.exit(f"--repo {options.repo} has no {name}; name a checkout of nanoGPT")
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(programs(options, Path(folder)), ROUNDS, STEPS)
    report(options, seconds)


def programs(options: Any, folder: Path) -> dict[str, Program]:
    """nanoGPT and a fit for each feed-forward layer, each in a folder of its own."""
    text = folder / "text.txt"
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text.write_bytes(b"".join(path.read_bytes() for path in library))
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    found = {"nanoGPT": nanogpt(options, folder / "nanogpt", text, options.precision, options.compile, threads)}
    if options.precision != "32-true" or options.compile:
        found["nanoGPT, stock for CPUs"] = nanogpt(options, folder / "stock", text, "32-true", False, threads)
    for ffn in options.ffn:
        found[f"moa fit, {ffn}"] = ours(options, folder / ffn, text, ffn)
    return found


def nanogpt(options: Any, folder: Path, text: Path, precision: str, compiled: bool, threads: dict[str, str]) -> Program:
    folder.mkdir()
    for name in FILES:
        shutil.copy(options.repo / name, folder)
    if precision == "bf16-mixed":
        code = (folder / "train.py").read_text()
        if NO_AUTOCAST not in code:
            sys.exit(f"train.py in {options.repo} is not the one that is known here: it lacks '{NO_AUTOCAST}'")
        (folder / "train.py").write_text(code.replace(NO_AUTOCAST, "ctx = "))
    (folder / "data" / "bytes").mkdir(parents=True)
    tokens = np.frombuffer(text.read_bytes(), dtype=np.uint8).astype(np.uint16)
    for split in ("train", "val"):
        tokens.tofile(folder / "data" / "bytes" / f"{split}.bin")
    settings = {
        "dataset": "'bytes'",
        "device": "'cpu'",
        "dtype": "'bfloat16'" if precision == "bf16-mixed" else "'float32'",
        "compile": compiled,
        "eval_iters": 1,
        "eval_interval": 10**9,
        "log_interval": 10,
        "n_layer": options.layers,
        "n_head": options.heads,
        "n_embd": options.width,
        "block_size": options.context,
        "batch_size": options.batch,
        "gradient_accumulation_steps": 1,
    }
    (folder / "settings.py").write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
    (folder / "data" / "bytes" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 256}))
    return Program([sys.executable, str(HERE / "nanogpt.py"), "run"], folder, threads)


def ours(options: Any, folder: Path, text: Path, ffn: str) -> Program:
    settings = {
        "data.source": text,
        "data.context_length": options.context,
        "data.batch_size": options.batch,
        "model.gpt.depth": options.layers,
        "model.gpt.num_heads": options.heads,
        "model.gpt.dim": options.width,
        "model.gpt.tie_embeddings": "true",
        "model.ffn.hidden_ratio": 8 / 3 if "gated" in ffn or ffn == "swiglu" else 4,
        "model.compile": str(options.compile).lower(),
        "trainer.precision": options.precision,
    }
    return fit(("language/shakespeare_char", "data/text_90_10", f"ffn/{ffn}"), settings, folder, options.threads)


def report(options: Any, seconds: dict[str, list[float]]) -> None:
    import torch

    tokens, found = options.batch * options.context, {}
    print(f"{options.precision}, compile {options.compile}, {options.threads} threads, torch {torch.__version__}")
    for name, times in seconds.items():
        ratios = [theirs / own for theirs, own in zip(seconds["nanoGPT"], times, strict=True)]
        found[name] = {
            "tokens_per_second": tokens / statistics.median(times),
            "of_nanogpt": statistics.median(ratios),
            "of_nanogpt_by_round": [round(ratio, 3) for ratio in ratios],
        }
        speed, ratio = found[name]["tokens_per_second"], found[name]["of_nanogpt"]
        print(f"{name:28} {speed:8,.0f} tokens/s  {ratio:.2f} x nanoGPT  ({min(ratios):.2f} to {max(ratios):.2f})")
    if options.out is not None:
        settings = {key: value for key, value in vars(options).items() if key not in ("repo", "out")}
        content = {"settings": settings, "torch": torch.__version__, "found": found}
        options.out.write_text(json.dumps(content, indent=1) + "\n")


class Clock(ModuleType):
    """The module `time` for train.py, which asks for the time where a step begins."""

    def __init__(self) -> None:
        import time

        super().__init__("time")
        self.__dict__.update({key: value for key, value in vars(time).items() if key != "time"})
        self._turn, self._time = Turn(), time.time

    def time(self) -> float:
        if sys._getframe(1).f_globals.get("__name__") == "__main__":
            self._turn.step()
        return self._time()


def run() -> None:
    """nanoGPT's train.py in this process."""
    sys.path.insert(0, os.getcwd())
    sys.modules["time"] = Clock()
    sys.argv = ["train.py", "settings.py"]
    runpy.run_path("train.py", run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run()
    else:
        main(sys.argv[1:])
