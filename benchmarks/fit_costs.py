"""What parts of a `moa fit` cost, in turns: a joint fit against its two runs apart, and the online evaluation of MAE.

    python benchmarks/fit_costs.py [--threads 2] [--out FILE]

Joint: configs/joint/mae_gpt_tiny.yaml with MoA and nothing tied, a step of either domain a step, against a step of
each run by itself. Evaluation: configs/vision/mae_tiny.yaml with GELU on 5,000 pictures of 28 pixels, in class folders
and without classes: the linear probe learns in each step, and every 60 steps a validation draws the features of the
bank (training images) and of the held-out images, votes, and writes. The pictures are noise, as nothing is judged here.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from turns import fit, measure

CLASSES, PICTURES, SIZE = 10, 5_000, 28
EVERY = 60  # steps from one validation to the next
JOINT_STEPS, ROUNDS = 20, 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {"joint": joint(options, Path(folder)), "evaluation": evaluation(options, Path(folder))}
    if options.out is not None:
        settings = {"threads": options.threads, "rounds": options.rounds}
        content = {"settings": settings, "torch": torch.__version__, "found": found}
        options.out.write_text(json.dumps(content, indent=1) + "\n")


def joint(options: Any, folder: Path) -> dict[str, Any]:
    """Seconds of a step, and the joint fit's by those of both others in the same round."""
    threads, biases = options.threads, {"model.ffn.bias": "true"}
    clipping = {"trainer.gradient_clip_val": "null"}  # which joint fits have not
    seconds = measure(
        {
            "joint": fit(("joint/mae_gpt_tiny", "ffn/moa"), {}, folder / "joint", threads),
            "vision": fit(("vision/mae_tiny", "data/mnist5k", "ffn/moa"), biases, folder / "vision", threads),
            "language": fit(
                ("language/gpt_tiny", "data/stdlib", "ffn/moa"), {**biases, **clipping}, folder / "language", threads
            ),
        },
        options.rounds,
        JOINT_STEPS,
    )
    rounds = zip(seconds["joint"], seconds["vision"], seconds["language"], strict=True)
    ratios = [both / (vision + language) for both, vision, language in rounds]
    return told("joint fit / its runs apart", seconds, ratios)


def evaluation(options: Any, folder: Path) -> dict[str, Any]:
    """Seconds of a step with nothing beside it, with the probe, and with a validation every EVERY steps."""
    images = np.random.default_rng(0).integers(256, size=(PICTURES, SIZE, SIZE), dtype=np.uint8)
    for name, classes in (("labelled", CLASSES), ("plain", 1)):
        for index, image in enumerate(images):
            place = folder / name / (str(index % classes) if classes > 1 else "")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{index}.png")
    files = ("vision/mae_tiny", "data/image_folder", "ffn/gelu")
    settings = {"data.image_size": SIZE, "data.source": folder / "labelled"}
    programs = {
        "neither": fit(files, {**settings, "data.source": folder / "plain"}, folder / "neither", options.threads),
        "probe": fit(files, settings, folder / "probe", options.threads),
        "both": fit(files, {**settings, "trainer.val_check_interval": EVERY}, folder / "both", options.threads),
    }
    seconds = measure(programs, options.rounds, EVERY, warm_up=EVERY)
    found = {}
    for name in ("probe", "both"):
        ratios = [own / least for own, least in zip(seconds[name], seconds["neither"], strict=True)]
        found[name] = told(f"{name} / neither", {part: seconds[part] for part in ("neither", name)}, ratios)
    return found


def told(title: str, seconds: dict[str, list[float]], ratios: list[float]) -> dict[str, Any]:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    steps = ", ".join(f"{name} {1000 * time:.1f}" for name, time in medians.items())
    print(f"{title:28} {statistics.median(ratios):.3f} x  ({min(ratios):.3f} to {max(ratios):.3f}); ms a step: {steps}")
    return {
        "step_seconds": medians,
        "ratio": statistics.median(ratios),
        "ratio_by_round": [round(ratio, 4) for ratio in ratios],
    }


if __name__ == "__main__":
    main()
