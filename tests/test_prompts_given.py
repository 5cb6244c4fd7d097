"""Prompts and chat templates as users have them: placeholders in the text, templates for text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import vtc_zoo

from vtc.commands import cli, loading
from vtc.errors import InvalidInput, UnsupportedModel
from vtc.harness import chats

ZOO = cli.ZOO_MODEL
PICTURE = str(Path(__file__).parents[1] / "demos" / "pictures" / "scene_1.png")
METHOD = ("--method", "random", "--keep", "4", "--max-new-tokens", "2")
#: as language models have it: one fails on a list, the other writes it down
FAILS = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] }}{% endfor %}"
WRITES = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"


def run(model: str, prompt: str, *images: str) -> int:
    return cli.main(["run", "--model", model, "--image", *images, "--prompt", prompt, *METHOD])


@pytest.fixture(scope="module")
def processor() -> object:
    return vtc_zoo.load(ZOO)[1]


def test_a_placeholder_in_the_prompt_is_where_the_image_stands(
    processor: object, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = loading.prompted(processor, "how many ?", "image")
    assert plain.count("<image>") == 1
    assert loading.prompted(processor, "<image>how many ?", "image") == plain
    assert run(ZOO, "<image> how many objects are there ?", PICTURE) == 0
    capsys.readouterr()
    assert run(ZOO, "<image><image> how many ?", PICTURE) == 2
    assert capsys.readouterr().err == (
        "vtc: the prompt holds '<image>' 2 times, but the number of images is 1: write as many, or "
        "none.\n"
    )


def test_a_template_is_given_media_in_their_places() -> None:
    class Processor:
        image_token, chat_template = "<image>", "any"

        def apply_chat_template(self, chat: list[dict[str, object]], **_: object) -> str:
            self.content = chat[0]["content"]
            return ""

    def content(prompt: str, count: int) -> object:
        loading.prompted(processor, prompt, "image", count)
        return processor.content

    processor, image = Processor(), {"type": "image"}
    one, other = ({"type": "text", "text": text} for text in ("one ", " other ?"))
    assert content("one <image> other ?", 1) == [one, image, other]
    assert content("<image>one <image> other ?", 2) == [image, one, image, other]
    assert content("one ", 2) == [image, image, one]
    assert content("", 1) == [image, {"type": "text", "text": ""}]


@pytest.mark.parametrize("template", [FAILS, WRITES])
def test_a_chat_template_for_text_is_refused(
    template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(vtc_zoo.path(ZOO), tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    says = (
        "the chat template of LlavaProcessor is for text alone, and cannot place images or videos"
    )
    assert run(str(model), "how many ?", PICTURE) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"vtc: {says} (") and told.err.count("\n") == 1
    words = ("--model", str(model), "--images", PICTURE, "--methods", "grid")
    assert cli.main(["bench", "loyalty", *words]) == 1
    assert says in capsys.readouterr().err
    writer = chats.Writer(vtc_zoo.load_folder(model)[1])
    chat = [chats.Turn("user", (chats.Part("image", PICTURE), chats.Part("text", "how many ?")))]
    with pytest.raises(UnsupportedModel, match="is for text alone"):
        writer.write(chat)


def test_what_a_processor_says_of_a_prompt_is_one_error() -> None:
    class Processor:
        image_token = "<image>"

        def __call__(self, **_: object) -> None:
            raise ValueError("mismatch")

    with pytest.raises(
        InvalidInput, match="^Processor cannot read this prompt with 2 images: mism"
    ):
        loading.encode(Processor(), "what ?", ["a", "b"])
