"""Kinds of devices that a run can be planned for.

Figures are those of the makers' data sheets, products dense (the sheets print twice as much "with sparsity"):
A100: NVIDIA A100 Tensor Core GPU data sheet (SXM). H100, H200: NVIDIA H100 and H200 Tensor Core GPU data sheets (SXM).
B200: NVIDIA HGX B200 data sheet, an eighth of the board. L40S: NVIDIA L40S data sheet. RTX 4090: NVIDIA Ada GPU
architecture white paper, bfloat16 with float32 accumulation. The figures of H200, B200, L40S and RTX 4090 agree with
public listings of November 2026, with two remarks: a B200 has 192 GB installed, of which an HGX board offers 180 (its
driver shows 179), and its float32 is 75 or 80 TFLOP/s by the source. float32 is that of the plain units, which torch
uses unless TF32 is switched on. The link is NVLink, or PCIe where there is none, in one direction.

A GB here is 10^9 bytes, though cards hold somewhat more: the rest is left to the driver's context, the libraries'
workspaces and the gaps of the allocator.
"""

from dataclasses import dataclass, replace

from ..errors import UserError


@dataclass(frozen=True)
class Device:
    """One device."""

    name: str
    memory: float
    """bytes"""
    bf16: float
    """peak FLOP/s of dense matrix products in bfloat16"""
    fp32: float
    """the same in float32"""
    link: float | None
    """bytes a second to other devices of its machine, one direction; None: not known"""
    gpu: bool = True
    """whether its operations are those of a GPU"""

    def peak(self, precision: str) -> float:
        """Peak FLOP/s at a Trainer's precision."""
        return self.bf16 if precision.startswith("bf16") else self.fp32


DEVICES = {
    device.name: device
    for device in (
        Device("a100-40", 40e9, 312e12, 19.5e12, 300e9),
        Device("a100-80", 80e9, 312e12, 19.5e12, 300e9),
        Device("h100", 80e9, 989.4e12, 66.9e12, 450e9),
        Device("h200", 141e9, 989.4e12, 66.9e12, 450e9),
        Device("b200", 180e9, 2250e12, 75e12, 900e9),
        Device("l40s", 48e9, 362e12, 91.6e12, 32e9),
        Device("rtx4090", 24e9, 165.2e12, 82.6e12, 32e9),
    )
}


def find_device(name: str, memory: float | None, tflops: float | None, link: float | None) -> Device:
    """The device of a name, its figures replaced by those that are given.

    Args:
        memory: GB (10^9 bytes).
        tflops: 10^12 FLOP/s at the run's precision.
        link: GB a second.

    Raises:
        UserError: an unknown name without memory and tflops.
    """
    device = DEVICES.get(name)
    if device is None:
        if memory is None or tflops is None:
            raise UserError(
                f"--device '{name}' is unknown; choose from {', '.join(DEVICES)}, or describe it with --memory GB "
                "and --tflops N"
            )
        device = Device(name, 0.0, 0.0, 0.0, None, gpu=name != "cpu")
    if memory is not None:
        device = replace(device, memory=memory * 1e9)
    if tflops is not None:
        device = replace(device, bf16=tflops * 1e12, fp32=tflops * 1e12)
    return device if link is None else replace(device, link=link * 1e9)
