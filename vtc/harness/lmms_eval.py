"""The model `vtc` of lmms-eval: any vision-language model of transformers, with any recipe.

lmms-eval --model vtc --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=divprune,keep=0.25
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InvalidInput, UnsupportedModel, VtcError
from .arguments import Arguments, check_count
from .chats import Part, Turn
from .model import ChatModel, Generation

try:
    from lmms_eval.api.instance import (  # pyright: ignore[reportMissingImports]
        GenerationResult,
        TokenCounts,
    )
    from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
    from lmms_eval.models.model_utils.gen_metrics import (  # pyright: ignore[reportMissingImports]
        log_metrics,
    )
    from loguru import logger  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise VtcError(
        f"{error}. The model of lmms-eval needs lmms-eval: "
        f"pip install 'vision-token-compression[lmms-eval]'."
    ) from error


class Vtc(lmms):
    """A chat model of lmms-eval. Arguments: see `vtc.harness.arguments`."""

    is_simple = False

    def __init__(self, batch_size: int | str = 1, **given: Any) -> None:
        super().__init__()
        from accelerate import Accelerator

        text = str(batch_size)
        check_count("batch_size", int(text) if text.isdigit() else batch_size)
        self.batch_size = int(text)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if self._world_size > 1:
            given["device"] = str(self.accelerator.device)
        arguments = Arguments.read(given)
        self.max_new_tokens = arguments.max_new_tokens
        self.chat = ChatModel.load(arguments)

    @property
    def device(self) -> Any:
        return self.chat.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers in the order of the requests; those with the same settings share batches."""
        from tqdm import tqdm

        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[2]), []).append(number)
        results: dict[int, Any] = {}
        before = self.chat.seconds
        with tqdm(total=len(requests), disable=self.rank != 0, unit="request") as bar:
            for numbers in alike.values():
                generation = self._generation(requests[numbers[0]].args[2])
                for first in range(0, len(numbers), self.batch_size):
                    batch = numbers[first : first + self.batch_size]
                    chats = [self._chat(requests[number]) for number in batch]
                    replies = self.chat.generate(chats, generation)
                    for number, reply in zip(batch, replies, strict=True):
                        counts = TokenCounts(reply.tokens_in, reply.tokens_out)
                        results[number] = GenerationResult(reply.text, counts)
                    bar.update(len(batch))
        self._log(list(results.values()), self.chat.seconds - before)
        return [results[number] for number in range(len(requests))]

    def _generation(self, given: dict[str, Any]) -> Generation:
        # lmms-eval adds an empty line to every task that names no `until`, and its own models go on
        # behind it: reasoning would lose its answer
        until = given.get("until") or ()
        until = [until] if isinstance(until, str) else until
        own = {**given, "until": [text for text in until if text != "\n\n"]}
        generation = Generation.read(own, self.max_new_tokens)
        if generation.ignored:
            logger.warning(
                f"vtc: generate() of transformers does not know, so these settings of the task "
                f"have no effect: {', '.join(generation.ignored)}"
            )
        return generation

    def _chat(self, request: Any) -> list[Turn]:
        """The messages of a request: roles, with parts of text, images (`url`) and videos."""
        _, messages, _, doc, task, split = request.args
        turns = []
        for message in messages(self.task_dict[task][split][doc]):
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            turns.append(Turn(message["role"], tuple(map(_part, parts))))
        return turns

    def _log(self, results: list[Any], seconds: float) -> None:
        """Time and tokens go to the harness's own results, the session's report to its log."""
        made = sum(result.token_counts.output_tokens for result in results)
        numbers = {"num_requests": len(results), **self.chat.numbers()}
        log_metrics(seconds, made, made / seconds if seconds else 0.0, numbers)
        logger.info(f"vtc: {self.chat.report()}")

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        raise _refused("log-likelihoods of given answers (output_type loglikelihood)")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        raise _refused("several rounds (output_type generate_until_multi_round)")

    def clean(self) -> None:
        """Called when all requests are answered: hooks go, and the model with them."""
        self.chat.close()
        del self.chat
        super().clean()


def _part(part: dict[str, Any]) -> Part:
    kind = part["type"]
    if part.get("start_time") is not None or part.get("end_time") is not None:
        raise InvalidInput("a video with start_time or end_time: whole videos only are read.")
    return Part(kind, part["text"] if kind == "text" else part["url"])


def _refused(what: str) -> VtcError:
    return UnsupportedModel(
        f"the model `vtc` of lmms-eval answers no {what}: choose a task with output_type "
        f"generate_until."
    )
