"""`python -m tests.soak.malformed`: malformed inputs, made by seeded damage to valid ones, against the command `moa`.

Each case runs in a process forked from this one, which has imported everything; so a case costs a second, and a crash
or a hang is seen from outside. A case is well if it ends in time with exit code 0, or with exit code 2, one sentence on
stderr and no new file; if there is no traceback; and if nothing of the input was executed, which would leave a file
named canary.
"""

import argparse
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from moa_lightning.cli import main as moa
from tests.data.conftest import write_pictures
from tests.data.test_shards import png, write_tar
from tests.soak.mutations import Payload, change_config, change_tree, damage

SECONDS = 60.0  # that a case may take
MEMORY = 4 << 30  # bytes of addresses that a case may take beyond what the parent has
TINY_ViT = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
TRAINER = {"max_steps": 1, "accelerator": "cpu", "precision": "32-true", "limit_val_batches": 1}
EVIL = (
    "from pathlib import Path\nPath('canary').touch()\nimport lightning as L\n"
    "class Sly(L.Callback): pass\ndef run(*_): Path('canary').touch()\n"
)
BAD = ("traceback", "hang", "crash", "partial output", "executed", "more than a sentence")


class Outcome(NamedTuple):
    """How a case ended ("ran", "refused", "stopped" after a step, whose run is kept, or one of BAD), and its output."""

    verdict: str
    printed: str


def vision(**data: Any) -> dict[str, Any]:
    """A config that trains a small MAE for a step."""
    data = {"image_size": 16, "batch_size": 4, "bank_size": 8, "max_val_samples": 4, **data}
    name = "data.ImageShards" if "train" in data else "data.Images"
    ffn = {"mixing": "moa", "dictionary": ["gelu", "silu"], "gate": "sigmoid"}
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    model = {"class_path": "tasks.MAE", "init_args": {"ffn": ffn, "backbone_args": dict(TINY_ViT), **decoder}}
    return {"model": model, "data": {"class_path": name, "init_args": data}, "trainer": dict(TRAINER)}


def language(**data: Any) -> dict[str, Any]:
    """A config that trains a small GPT for a step."""
    data = {"context_length": 16, "batch_size": 4, "max_val_samples": 4, **data}
    name = "data.TextShards" if "train" in data else "data.TextFiles"
    gpt = {"dim": 16, "depth": 1, "num_heads": 2}
    model = {"class_path": "tasks.LanguageModeling", "init_args": {"gpt": gpt}}
    return {"model": model, "data": {"class_path": name, "init_args": data}, "trainer": dict(TRAINER)}


def write_valid(folder: Path) -> None:
    """Valid inputs of all kinds, and a run with its checkpoint."""
    write_pictures(folder / "pictures/cat", 12)
    write_pictures(folder / "pictures/dog", 12)
    for kind in ("jpg", "webp", "gif"):
        _convert(folder / f"pictures/cat/0.{kind}")
    write_tar(
        folder / "pictures.tar", [m for n in range(12) for m in ((f"{n}.png", png(n)), (f"{n}.cls", b"%d" % (n % 3)))]
    )
    words = "the quick brown fox jumps over a lazy dog, and it sleeps on…\n"
    write_tar(folder / "words.tar", [(f"{n}.txt", (words * 20).encode()) for n in range(6)])
    (folder / "words.txt").write_text(words * 60)
    configs = {
        "images": vision(source="pictures"),
        "image shards": vision(train="pictures.tar", val="pictures.tar"),
        "text": language(source="words.txt"),
        "text shards": language(train="words.tar", val="words.tar", encoding="utf-8"),
        "digits": vision(source="mnist5k"),
    }
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "evil.py").write_text(EVIL)


def _convert(path: Path) -> None:
    from PIL import Image

    Image.open(path.with_name("0.png")).save(path)


FIT = ["fit", "--run_dir", "run", "--trainer.max_steps", "1"]


def bad_config(folder: Path, draw: random.Random) -> list[str]:
    name = draw.choice(("digits", "text", "images", "text shards"))
    path = folder / f"{name}.yaml"
    path.write_bytes(change_config(yaml.safe_load(path.read_text()), draw))
    return [*FIT, "-c", path.name]


def bad_shard(folder: Path, draw: random.Random) -> list[str]:
    kind, name = draw.choice((("image", "pictures.tar"), ("text", "words.tar")))
    path = folder / name
    content = path.read_bytes()
    if draw.random() < 0.5:
        content = _bad_header(content, draw)
    else:
        content = damage(content, draw)
    path.write_bytes(content)
    return [*FIT, "-c", f"{kind} shards.yaml", "--data.on_bad_sample", draw.choice(("raise", "skip"))]


def _bad_header(content: bytes, draw: random.Random) -> bytes:
    """A field of a tar header exchanged, with a checksum that holds."""
    result = bytearray(content)
    start = draw.choice([at for at in range(0, len(result) - 512, 512) if result[at + 257 : at + 262] == b"ustar"])
    first, last = draw.choice(((0, 100), (100, 108), (124, 136), (156, 157), (157, 257), (257, 265), (345, 500)))
    values = (
        b"/etc/passwd",
        b"../../up.txt",
        b"a.pkl",
        b"a.cls",
        b"77777777777",
        b"\xff" * 12,
        b"\x80" + b"\xff" * 11,
        b"1",
    )
    value = draw.choice((*values, b"2", b"3", b"6", b"S", b"L", b"x", b"g", b"", draw.randbytes(12)))
    result[start + first : start + last] = value[: last - first].ljust(last - first, b"\0")
    result[start + 148 : start + 156] = b" " * 8
    result[start + 148 : start + 156] = b"%06o\0 " % sum(result[start : start + 512])
    return bytes(result)


def bad_index(folder: Path, draw: random.Random) -> list[str]:
    import json

    from data.shards import ShardIndex

    kind, name = draw.choice((("image", "pictures.tar"), ("text", "words.tar")))
    ShardIndex(str(folder / name))
    path = folder / f"{name}.index.json"
    content = json.loads(path.read_text())
    content["samples"] = change_tree(content["samples"], draw)
    text = json.dumps(content).encode()
    path.write_bytes(damage(text, draw) if draw.random() < 0.3 else text)
    return [*FIT, "-c", f"{kind} shards.yaml"]


def bad_image(folder: Path, draw: random.Random) -> list[str]:
    paths = sorted((folder / "pictures").rglob("*.*"))
    for path in draw.sample(paths, draw.choice((1, 3, len(paths)))):
        path.write_bytes(damage(path.read_bytes(), draw))
    return [*FIT, "-c", "images.yaml", "--data.on_bad_sample", draw.choice(("raise", "skip"))]


def bad_text(folder: Path, draw: random.Random) -> list[str]:
    path = folder / "words.txt"
    path.write_bytes(damage(path.read_bytes(), draw))
    choices = (
        "--data.encoding",
        draw.choice(("bytes", "utf-8")),
        "--data.on_bad_sample",
        draw.choice(("raise", "skip")),
    )
    return [*FIT, "-c", "text.yaml", *choices]


def bad_checkpoint(folder: Path, draw: random.Random) -> list[str]:
    path = folder / "valid/checkpoints/last.ckpt"
    how = draw.random()
    if how < 0.4:
        path.write_bytes(damage(path.read_bytes(), draw))
    elif how < 0.55:
        content = torch.load(path, weights_only=True)
        torch.save(content | {draw.choice((*content, "extra")): Payload()}, path)
    else:
        content = torch.load(path, weights_only=True)
        values = (None, -1, 0, 10**30, "x", [], {}, float("nan"), torch.zeros(0), torch.zeros(3), Payload())
        torch.save(change_tree(content, draw, values), path)
    if draw.random() < 0.5:
        return ["validate", "--ckpt_path", str(path.relative_to(folder))]
    return [
        "fit",
        "--run_dir",
        "run",
        "--ckpt_path",
        str(path.relative_to(folder)),
        "-c",
        "text.yaml",
        "--trainer.max_steps",
        "3",
    ]


KINDS: dict[str, Callable[[Path, random.Random], list[str]]] = {
    "config": bad_config,
    "shard": bad_shard,
    "index of a shard": bad_index,
    "image": bad_image,
    "text": bad_text,
    "checkpoint": bad_checkpoint,
}
SHARE = (  # of twenty cases, mixed so that a few have some of each
    *("config", "shard", "config", "image", "config", "checkpoint", "config", "text", "config", "shard"),
    *(
        "config",
        "index of a shard",
        "config",
        "checkpoint",
        "config",
        "image",
        "config",
        "shard",
        "shard",
        "checkpoint",
    ),
)


def run(arguments: list[str], folder: Path) -> Outcome:
    """Run `moa` in a forked process with `folder` as its working folder."""
    before = _files(folder)
    shown = folder.parent / f"{folder.name}.log"
    child = os.fork()
    if not child:
        _be_child(arguments, folder, shown)
    code = _wait(child)
    printed = shown.read_text(errors="backslashreplace")
    new = {path for path in _files(folder) - before if not path.name.endswith(".index.json")}
    return Outcome(verdict_of(code, printed, new), printed)


def _be_child(arguments: list[str], folder: Path, shown: Path) -> None:
    """Never returns."""
    code = 70
    try:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        output = os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        code = moa(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int) -> int | None:
    """Exit code of a process, negative for a signal, None where it had to be killed for the time it took."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def verdict_of(code: int | None, printed: str, new: set[Path]) -> str:
    """The verdict on an exit code (None: killed for its time), the output and the new files."""
    if any(path.name == "canary" for path in new):
        return "executed"
    if code is None:
        return "hang"
    if "Traceback (most recent call last)" in printed:
        return "traceback"
    if code == 0:
        return "ran"
    if code != 2:
        return "crash"
    sentences = [line for line in printed.splitlines() if line.startswith("moa: ")]
    if len(sentences) != 1:
        return "more than a sentence"
    if re.search(r"^step \d+/\d+ ", printed, re.MULTILINE):
        return "stopped"
    return "partial output" if new else "refused"


def _files(folder: Path) -> set[Path]:
    """All files near a case: in its folder and beside it, as a name may lead up."""
    return {path for path in folder.parent.rglob("*") if path.suffix != ".log"}


def soak(count: int, seed: int, keep: Path | None) -> Counter[tuple[str, str]]:
    """Run cases and print those that are not well; counts by kind and verdict."""
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache")
    import moa_lightning.lightning_cli  # noqa: F401 - so that the cases need not

    tally: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as root:
        valid = Path(root, "valid")
        write_valid(valid)
        for name in ("images", "image shards", "text", "text shards", "digits"):
            place = ["--run_dir", "valid" if name == "text" else f"run {name}"]
            outcome = run(["fit", "-c", f"{name}.yaml", *place], valid)
            assert outcome.verdict == "ran", f"the valid {name} do not run:\n{outcome.printed}"
            shutil.rmtree(valid / f"run {name}", ignore_errors=True)
        for number in range(count):
            draw = random.Random(f"{seed} {number}")
            kind = SHARE[number % len(SHARE)]
            folder = Path(root, f"case{number}", "work")
            shutil.copytree(valid, folder)
            arguments = KINDS[kind](folder, draw)
            outcome = run(arguments, folder)
            tally[kind, outcome.verdict] += 1
            if outcome.verdict in BAD:
                print(f"--- case {number} ({kind}): {outcome.verdict}\n{outcome.printed[-3000:]}", flush=True)
                if keep is not None:
                    shutil.copytree(folder, keep / f"case{number}", symlinks=True)
            shutil.rmtree(folder.parent)
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    return tally


def table(tally: Counter[tuple[str, str]]) -> str:
    """Kinds of input down, verdicts across."""
    verdicts = ("refused", "ran", "stopped", *BAD)
    lines = ["input | cases | " + " | ".join(verdicts), " | ".join(["---"] * (len(verdicts) + 2))]
    for kind in (*KINDS, "all"):
        row = [sum(n for (k, v), n in tally.items() if kind in (k, "all") and v == verdict) for verdict in verdicts]
        lines.append(" | ".join([kind, str(sum(row)), *map(str, row)]))
    return "\n".join(lines)


def command(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.malformed", description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="cases (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: 0)")
    parser.add_argument("--keep", type=Path, help="folder for the inputs of cases that are not well")
    options = parser.parse_args(argv)
    started = time.monotonic()
    tally = soak(options.count, options.seed, options.keep)
    print(table(tally))
    print(f"{options.count} inputs (seed {options.seed}) in {time.monotonic() - started:.0f} s")
    return int(any(verdict in BAD for _, verdict in tally))


if __name__ == "__main__":
    sys.exit(command())
