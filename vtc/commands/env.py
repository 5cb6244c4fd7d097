"""`vtc env`: versions here, which of them are supported and tested, and what is missing."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

from packaging.version import Version

from .. import __version__
from ..versions import GO_ON, LIBRARIES, Library
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
NEVER = "not supported"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print what is installed, what is supported and tested, and what is missing. A report of a "
        "fault should hold it. Exit code 1: a library is of a version that is not supported."
    )


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def run(args: argparse.Namespace) -> int:
    libraries = {library.name: library for library in LIBRARIES.values()}
    rows, missing, strange = [], [], []
    for name in dict.fromkeys((*libraries, *OPTIONAL)):
        version, library = installed(name), libraries.get(name)
        state = "" if version is None or library is None else _state(library, version)
        if version is None:
            what, extra = OPTIONAL.get(name, ("everything", ""))
            wanted = f"[{extra}]" * bool(extra)
            missing.append(f"{name}: {what} (pip install 'vision-token-compression{wanted}')")
            state = "missing"
        elif state == NEVER:
            strange.append(name)
        allowed = "" if library is None else library.supported.replace(",", ", ")
        tried = "" if library is None else ", ".join(library.tested)
        rows.append((name, version or "", allowed, tried, state))
    print(f"vtc {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"devices: {devices()}\n")
    print(tables.text_table(("library", "installed", "supported", "tested", "here"), rows))
    if missing:
        print("\nmissing:\n" + "\n".join(f"  {line}" for line in missing))
    if strange:
        print(f"\n{NEVER}: {', '.join(strange)}. vtc.attach refuses their models.")
        print(f"To go on at your own risk: {GO_ON}=1")
    return 1 if strange else 0


def _state(library: Library, version: str) -> str:
    if Version(version).public in library.tested:
        return "tested"
    return "supported" if library.supports(version) else NEVER


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
