"""Mixtures of text sources: which source each sample of an epoch comes from, by arithmetic alone.

An epoch has a declared number of samples, and each source its exact share of them (rounded by largest remainders). The
sources take turns as evenly as their shares allow: the j-th of a source's n samples is due at (j + 1/2) / n of the
epoch, as in stride scheduling, so the beginning of an epoch, however long, holds of a source with share p among S
sources what is due to within (1 + S p) / 2 samples. A source goes on in the next epoch where it stopped, through its
own seeded permutations, one pass after another; a source smaller than its share begins its next pass, in a new order,
while the others are still in their first. How often it is read is in the run's description. Nothing of this is state,
so a run may stop anywhere and go on with another number of devices.
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from data.base import EVAL_SEED, Samples
from data.sampling import epoch_order
from data.text import TextModule
from data.tokenizer import Tokenizer
from moa_lightning.errors import UserError
from moa_lightning.random import named_seed, sample_seed

KEPT_ORDERS = 4  # permutations of sources in memory


def shares(weights: Mapping[str, float], samples: int) -> dict[str, int]:
    """How many of the samples each source gives: in proportion to the weights, rounded by largest remainders."""
    total = sum(weights.values())
    exact = {name: samples * weight / total for name, weight in weights.items()}
    found = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: found[name] - exact[name])[: samples - sum(found.values())]:
        found[name] += 1
    return found


def turns(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The source of each sample, int16, and its number among those of its source, int64; (sum of counts,) both."""
    due = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    order = np.argsort(due, kind="stable")  # of samples due at once the earlier source's first
    source = np.repeat(np.arange(len(counts), dtype=np.int16), counts)[order]
    order -= np.cumsum([0, *counts[:-1]])[source]
    return source, order


class MixedSamples(Samples):
    """An epoch of training over several sources, already in the order in which it is to be seen.

    Args:
        parts: the sources' training samples.
        counts: samples that each gives to an epoch.
        blocks: each source's shuffle_block.
        seed: of nothing but what a substitute for a bad sample is.
    """

    training = True
    ordered = True

    def __init__(self, parts: list[Samples], counts: list[int], blocks: list[int], seed: int) -> None:
        super().__init__(seed)
        self.parts, self.counts, self.blocks = parts, counts, blocks
        self.source, self.number = turns(counts)
        self._order = lru_cache(maxsize=KEPT_ORDERS)(self._new_order)

    def __len__(self) -> int:
        return len(self.source)

    def _new_order(self, source: int, epoch: int) -> Tensor:
        part = self.parts[source]
        return epoch_order(len(part), part.seed, epoch, self.blocks[source])

    def place(self, index: int, epoch: int) -> tuple[int, int, int]:
        """Source, its own epoch, and its own sample, for a sample of the mixture."""
        source = int(self.source[index])
        taken = epoch * self.counts[source] + int(self.number[index])
        own_epoch, position = divmod(taken, len(self.parts[source]))
        return source, own_epoch, int(self._order(source, own_epoch)[position])

    def sample(self, index: int, epoch: int, seed: int) -> dict[str, Any]:
        source, own_epoch, own_index = self.place(index, epoch)
        part = self.parts[source]
        sample = part.sample(own_index, own_epoch, sample_seed(part.seed, own_epoch, own_index))
        return {**sample, "source": source}

    def uncounted(self, sample: dict[str, Any]) -> dict[str, Any]:
        return self.parts[0].uncounted(sample)


class JoinedSamples(Samples):
    """Held-out samples of several sources, one source after another.

    Args:
        parts: by the number of their source.
        seed: of evaluation.
    """

    training = False

    def __init__(self, parts: dict[int, Samples], seed: int) -> None:
        super().__init__(seed)
        self.sources, self.parts = list(parts), list(parts.values())
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def sample(self, index: int, epoch: int, seed: int) -> dict[str, Any]:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        sample = self.parts[number].sample(index - int(self.starts[number]), epoch, seed)
        return {**sample, "source": self.sources[number]}

    def uncounted(self, sample: dict[str, Any]) -> dict[str, Any]:
        return self.parts[0].uncounted(sample)


class Mixture(TextModule):
    """Several text sources with weights. The batch has the key "source", int64 (B,), the number of each one's source.

    Of what the sources say, only where their text lies, how it is split and their shuffle_block count, and their
    train_fraction, of which the mixture's own takes a share again; the other values are the mixture's. Weights and
    epoch_samples stay as they are given. val/loss weighs sources by their held-out tokens, val/loss_<source> is each
    one's own.

    Args:
        sources: text data modules by name, all with the same tokenizer.
        weights: share of each source in the samples, in any unit; None: the same for all.
        epoch_samples: samples in an epoch, rounded down to whole batches; None: as many as all sources have together.
        options: `TextModule`'s.

    Raises:
        UserError: no sources, weights that do not fit them, sources with different tokenizers; in `setup`, what the
            sources raise.
    """

    def __init__(
        self,
        sources: dict[str, TextModule],
        weights: dict[str, float] | None = None,
        epoch_samples: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(shuffle_block=0, **options)
        if not sources:
            raise UserError("data.sources is empty: name at least one source")
        self.weights = dict.fromkeys(sources, 1.0) if weights is None else dict(weights)
        if set(self.weights) != set(sources):
            raise UserError(
                f"data.weights names {', '.join(sorted(self.weights)) or 'nothing'}, and data.sources "
                f"{', '.join(sorted(sources))}: give each source a weight"
            )
        bad = next((name for name, weight in self.weights.items() if not 0 < weight < float("inf")), None)
        if bad is not None:
            raise UserError(f"data.weights.{bad} is {self.weights[bad]} but must be a number above 0")
        if epoch_samples is not None and epoch_samples < self.batch_size:
            raise UserError(
                f"epoch_samples is {epoch_samples} but a batch takes {self.batch_size}: give at least that many"
            )
        self.sources, self.epoch_samples = dict(sources), epoch_samples
        for name, source in self.sources.items():
            for option in ("context_length", "on_bad_sample", "max_val_samples", "max_test_samples", "mask_documents"):
                setattr(source, option, getattr(self, option))
            source.seed = named_seed(self.seed, f"source {name}")
        if self.train_fraction < 1:
            self.training_text = f"{self.train_fraction:g} of each source"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizers = {name: source.tokenizer for name, source in self.sources.items()}
        (first, tokenizer), *others = tokenizers.items()
        for name, other in others:
            if other.sha256 != tokenizer.sha256:
                raise UserError(
                    f"sources {first!r} and {name!r} have different tokenizers ({tokenizer.name} and {other.name}): "
                    "write their token files with one"
                )
        return tokenizer

    def prepare_data(self) -> None:
        for source in self.sources.values():
            source.prepare_data()

    def source_names(self, split: str) -> dict[int, str]:
        """The sources that a split has samples of, by number; after `setup`."""
        return {number: name for number, (name, source) in enumerate(self.sources.items()) if split in source.splits}

    def build(self) -> dict[str, Samples]:
        for name, source in self.sources.items():
            source.train_fraction *= self.train_fraction
            try:
                source.setup("build")
            except UserError as error:
                raise UserError(f"source {name!r}: {error}") from error
        self.faults = [fault for source in self.sources.values() for fault in source.faults]
        self.tokenizer  # noqa: B018 - the check that all have the same
        splits: dict[str, Samples] = {"train": self._train()}
        for split in ("val", "test"):
            parts = {number: self.sources[name].splits[split] for number, name in self.source_names(split).items()}
            if parts:
                splits[split] = JoinedSamples(parts, EVAL_SEED)
        return splits

    def _train(self) -> MixedSamples:
        parts = {name: source.splits["train"] for name, source in self.sources.items()}
        samples = self.epoch_samples or sum(len(part) for part in parts.values())
        samples = max(samples - samples % self.batch_size, 1)
        self.counts = shares(self.weights, samples)
        blocks = [source.shuffle_block for source in self.sources.values()]
        return MixedSamples(list(parts.values()), list(self.counts.values()), blocks, self.seed)

    def describe_source(self) -> dict[str, str | int]:
        facts: dict[str, str | int] = {}
        total, shown, digests = sum(self.counts.values()), [], []
        for name, source in self.sources.items():
            passes = self.counts[name] / source.train_samples
            repeats = f", read {passes:.2f} times an epoch" if passes > 1 else ""
            shown.append(f"{name} ({self.counts[name] / total:.1%}{repeats})")
            own = source.describe()
            digests.append(str(own.get("sha256")))
            facts |= {f"{name}_{key}": value for key, value in own.items()} | {f"{name}_share": self.counts[name]}
        digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        return {"source": ", ".join(shown), **facts, **({"sha256": digest} if "None" not in digests else {})}
