"""Videos: decoding, sampling of frames, decoding ahead in child processes, answering in bulk.

    clip = vtc.video.read("dance.mp4", "2fps,max=64")
    clip.frames                                   # uint8 [T, H, W, 3], RGB, upright
    clip.times                                    # seconds of each frame, from the file

Names are lazy: `import vtc.video` imports neither decord nor PyAV.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Clip": "decode",
    "Readers": "pool",
    "Result": "pool",
    "Sampling": "sampling",
    "Summary": "job",
    "VideoInfo": "sampling",
    "answer_questions": "run",
    "probe": "decode",
    "read": "decode",
    "write": "encode",
}

__all__ = [
    "Clip",
    "Readers",
    "Result",
    "Sampling",
    "Summary",
    "VideoInfo",
    "answer_questions",
    "probe",
    "read",
    "write",
]

if TYPE_CHECKING:
    from .decode import Clip as Clip
    from .decode import probe as probe
    from .decode import read as read
    from .encode import write as write
    from .job import Summary as Summary
    from .pool import Readers as Readers
    from .pool import Result as Result
    from .run import answer_questions as answer_questions
    from .sampling import Sampling as Sampling
    from .sampling import VideoInfo as VideoInfo


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vtc.video' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
