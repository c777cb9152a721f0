"""What this machine can do at best, measured and not read from a data sheet: how fast it copies and multiplies.

Everything else is reported as a share of these. The copy is of the size of a hidden activation, so that it sits in the
caches that the activation sits in. The data sheet's peak, where it is known, gives MFU besides.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..configs import cpu_has_bf16
from ..environment import device_name
from ..errors import UserError
from .timing import Effort, alternate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MANY = 10  # rounds of the machine's measurement for one of a variant's
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}  # as the Trainer calls them


@dataclass(frozen=True)
class Sizes:
    """How much is measured. The defaults are for the CPU."""

    tokens: int = 2048
    """in a batch of the operation, the layer and the GPT"""
    dim: int = 384
    hidden: int = 1536
    depth: int = 3
    heads: int = 6
    context: int = 512
    vocab: int = 256
    vit_dim: int = 384
    vit_depth: int = 3
    decoder_dim: int = 256
    decoder_depth: int = 1
    image: int = 224
    """side, pixels"""
    images: int = 16
    """in a batch of the masked autoencoder"""
    decode_layers: int = 12
    stored_images: int = 192
    """in the shards that are read"""
    stored_pixels: int = 256
    """side of such an image"""
    text_bytes: int = 4_000_000
    square: int = 1024
    """side of the matrices of the measured product"""


ON_CPU = Sizes()
ON_GPU = Sizes(  # the GPT of 124 million parameters; ViT-S with MAE's own decoder
    tokens=16384, dim=768, hidden=3072, depth=12, heads=12, context=1024, vocab=50304, vit_depth=12, decoder_dim=512,
    decoder_depth=8, images=128, stored_images=1024, text_bytes=32_000_000, square=8192,
)  # fmt: skip
QUICK = Sizes(
    tokens=64, dim=32, hidden=64, depth=1, heads=2, context=16, vocab=64, vit_dim=32, vit_depth=1, decoder_dim=32,
    image=32, images=2, decode_layers=2, stored_images=16, stored_pixels=64, text_bytes=40_000, square=64,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Where, on what sizes and how long it is measured."""

    device: torch.device
    sizes: Sizes
    effort: Effort
    dtypes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"sizes": asdict(self.sizes), "effort": asdict(self.effort)}


def find_device(name: str | None) -> torch.device:
    """The device of a name; None takes a GPU where there is one.

    Raises:
        UserError: this machine has no such device.
    """
    if name not in (None, "cpu", "cuda"):
        raise UserError(f"--device is '{name}'; choose from cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, and torch finds no GPU here; choose cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def fast_dtypes(device: torch.device) -> tuple[str, ...]:
    """The dtypes that are measured: bfloat16 only where the hardware multiplies it."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = cpu_has_bf16()
    return ("float32", "bfloat16") if fast else ("float32",)


@dataclass(frozen=True)
class Machine:
    """What was measured of the device, by dtype."""

    name: str
    copy: dict[str, float]
    """bytes a second, read and written"""
    product: dict[str, float]
    """FLOP/s of a square matrix product"""
    peak: dict[str, float | None]
    """FLOP/s by the maker's data sheet; None where it is not known"""

    def about(self, setting: Setting, keeps_memory: bool) -> dict[str, Any]:
        """Everything that a reader needs to know of how it was measured."""
        kept = "glibc keeps freed blocks (mallopt: M_MMAP_MAX 0, M_TRIM_THRESHOLD -1)"
        return {
            **asdict(self),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "malloc": kept if keeps_memory else "as the system has it: page faults of freed blocks are in the figures",
            **setting.as_dict(),
        }


def measure_machine(setting: Setting) -> Machine:
    """Measure the copy and the product: the best of many, as other load can only make them slower."""
    from ..callbacks.throughput import peak_flops

    device, sizes = setting.device, setting.sizes
    copies, products, peaks = {}, {}, {}
    for name in setting.dtypes:
        dtype = DTYPES[name]
        source = torch.zeros(sizes.tokens, sizes.hidden, device=device, dtype=dtype)
        target = torch.empty_like(source)
        a = torch.randn(sizes.square, sizes.square, device=device).to(dtype)
        out = torch.empty_like(a)
        calls = {
            "copy": lambda source=source, target=target: target.copy_(source),
            "product": lambda a=a, out=out: torch.mm(a, a, out=out),
        }
        seconds = alternate(calls, replace(setting.effort, rounds=MANY * setting.effort.rounds), device)
        copies[name] = 2 * source.nbytes / min(seconds["copy"])
        products[name] = 2 * sizes.square**3 / min(seconds["product"])
        peaks[name] = peak_flops(device, PRECISIONS[name])
    return Machine(device_name(device), copies, products, peaks)
