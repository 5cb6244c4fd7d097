"""`vtc env`: the versions here, which of them were tested, and what is missing for what."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

from .. import __version__
from ..versions import GO_ON, TESTED, tested
from . import tables

#: packages that a part of vtc needs -> what for, and the extra that brings it
OPTIONAL = {
    "timm": ("image encoders of timm", "vision"),
    "open_clip_torch": ("image encoders of open_clip", "vision"),
    "torchvision": ("processors of pictures and videos", "vision"),
    "diffusers": ("diffusion transformers", "diffusers"),
    "triton": ("fused kernels on a GPU", "kernels"),
    "decord": ("reading videos", "video"),
    "av": ("reading videos that decord cannot", "video"),
    "matplotlib": ("vtc plot", "plot"),
    "gradio": ("vtc demo --web", "gradio"),
}
NEVER = "never tested"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print what is installed, what was tested, and what is missing. A report of a fault should "
        "hold it. Exit code 1: something is of a version that was never tested."
    )


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def run(args: argparse.Namespace) -> int:
    ranges = {name: (package, allowed) for package, (name, allowed) in TESTED.items()}
    rows, missing, strange = [], [], []
    for name in dict.fromkeys((*ranges, "accelerate", *OPTIONAL)):
        version, (package, allowed) = installed(name), ranges.get(name, ("", ""))
        state = ""
        if version is None:
            what, extra = OPTIONAL.get(name, ("everything", ""))
            wanted = f"[{extra}]" * bool(extra)
            missing.append(f"{name}: {what} (pip install 'vision-token-compression{wanted}')")
            state = "missing"
        elif package:
            state = "tested" if tested(package, version) else NEVER
        if state == NEVER:
            strange.append(name)
        rows.append((name, version or "", allowed.replace(",", ", "), state))
    print(f"vtc {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"devices: {devices()}\n")
    print(tables.text_table(("library", "installed", "tested", "here"), rows))
    for title, lines in (("missing", missing), (NEVER, strange)):
        if lines:
            print(f"\n{title}:\n" + "\n".join(f"  {line}" for line in lines))
    if strange:
        print(f"\nvtc.attach refuses their models. To go on at your own risk: {GO_ON}=1")
    return 1 if strange else 0


def devices() -> str:
    """Accelerators that torch sees, or that there is none."""
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
        return f"{names} (CUDA {torch.version.cuda})"
    if torch.backends.mps.is_available():
        return "mps"
    return f"no GPU, {torch.get_num_threads()} CPU threads"
