"""Models with fewer visual tokens inside evaluation harnesses.

`lmms_eval` is a plug-in of lmms-eval, `vlmeval` a model class for VLMEvalKit. Both hold a
`model.ChatModel`. Importing this package imports neither harness."""

from __future__ import annotations

from typing import Any


def lmms_eval_manifest() -> Any:
    """What the entry point `lmms_eval.models` hands over: the model `vtc` answers chats."""
    from lmms_eval.models.registry_v2 import (  # pyright: ignore[reportMissingImports]
        ModelManifest,
    )

    return ModelManifest(model_id="vtc", chat_class_path="vtc.harness.lmms_eval.Vtc")
