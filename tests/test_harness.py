"""Models in evaluation harnesses: arguments, prompts, answers, and the class for VLMEvalKit. What
needs lmms-eval itself is in tests/harness, which .ci/harness runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vtc_zoo
from PIL import Image
from support import video_models
from vtc_zoo.shapes import test_set as draw

import vtc
import vtc.video
from vtc.errors import InvalidInput, InvalidRecipe, NothingReduced, UnsupportedModel, VtcError
from vtc.harness.arguments import Arguments
from vtc.harness.chats import Part, Turn, Writer
from vtc.harness.model import ChatModel, Generation
from vtc.harness.vlmeval import CompressedVLM
from vtc.video.prompts import processed
from vtc.video.sampling import Sampling

ZOO = "tiny-llava-shapes"
CONFIG = str(Path(__file__).parent.parent / "configs" / "divprune_25.yaml")
THREE = Generation({"max_new_tokens": 3, "do_sample": False})


def chat(*values: Any) -> list[Turn]:
    """One turn of a user: texts, pictures, and paths of videos."""

    def kind(value: Any) -> str:
        return {str: "text", type(Path()): "video"}.get(type(value), "image")

    return [Turn("user", tuple(Part(kind(value), value) for value in values))]


@pytest.fixture(scope="module")
def zoo() -> tuple[Any, Any]:
    return vtc_zoo.load(ZOO)


@pytest.fixture(scope="module")
def asked() -> list[tuple[Image.Image, str, str]]:
    """Pictures, questions of different lengths, right answers."""
    return [(scene.image, q.text, q.answer) for scene, own in draw(4, 2) for q in own]


def plain(model: Any, processor: Any, image: Any, question: str, session: Any = None) -> list[int]:
    """Ids that `generate` itself answers to one question, by the model's own prompt."""
    text, images = vtc_zoo.prompt(question), {} if image is None else {"images": image}
    text = text if images else text.removeprefix("<image> ")
    inputs = processor(text=text, return_tensors="pt", **images)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def hooks(model: Any) -> int:
    """How many there are; transformers has some of its own."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------------- importing


def test_importing_the_package_imports_no_harness() -> None:
    heavy = ("lmms_eval", "vlmeval", "transformers", "torch")
    code = f"import sys, vtc.harness; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_lmms_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.instance"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "vtc.harness.lmms_eval", raising=False)
    with pytest.raises(VtcError, match=r"pip install 'vision-token-compression\[lmms-eval\]'"):
        import vtc.harness.lmms_eval  # noqa: F401


# ---------------------------------------------------------------------- arguments


def test_arguments_say_what_compresses() -> None:
    assert Arguments.read({"pretrained": ZOO}).request is None
    read = Arguments.read({"pretrained": ZOO, "recipe": CONFIG, "frames": "2fps,max=16"})
    assert read.request == {"method": vtc.Recipe.load(Path(CONFIG))}
    assert read.frames == Sampling(rate=2.0, limit=16)
    given = {"method": "fastv", "keep": 0.5, "at": "decoder.2", "mass": 1, "pool": "max"}
    assert Arguments.read({"pretrained": ZOO, **given}).request == given
    read = Arguments.read({"pretrained": ZOO, "method": "evs", "keep": "0.5", "seed": 3})
    assert read.request == {"method": "evs", "keep": 0.5, "seed": 3}  # text of a command line
    two = {"method": "random", "keep": 0.5, "at": "[vision.2, projector]"}
    read = Arguments.read({"pretrained": ZOO, **two})
    assert read.request == {**two, "at": ["vision.2", "projector"]}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pretraned": ZOO}, "'pretraned'.*Did you mean 'pretrained'.*attn_impl.*recipe.*seed"),
        ({"method": "fastv", "keep": 0.5, "poool": "max"}, "'poool'.*Did you mean 'pool'"),
        ({"method": "fastvv", "keep": 0.5}, "'fastvv'.*Did you mean 'fastv'"),
        ({"recipe": CONFIG, "keep": 0.5}, "already says everything: leave out keep"),
        ({"recipe": CONFIG, "method": "fastv"}, "already says everything: leave out method"),
        ({"recipe": "nowhere.yaml"}, "cannot read recipe 'nowhere.yaml'"),
        ({"keep": 0.5}, "keep without a method"),
        ({"method": "divprune", "keep": 1.5}, "keep=1.5"),
        ({"method": "divprune", "keep": 0.5, "at": "[a"}, r"at='\[a' is no value.*a list such as"),
        ({"pretrained": None}, "pretrained is missing"),
        ({"trust_remote_code": "yes"}, "trust_remote_code='yes'"),
        ({"dtype": "int8"}, "dtype='int8'.*bfloat16"),
        ({"frames": "often"}, "sampling 'often'"),
        ({"backend": "vlc"}, "backend='vlc'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_arguments_that_are_wrong(given: dict[str, Any], said: str) -> None:
    with pytest.raises(VtcError, match=f"(?s){said}"):
        Arguments.read({"pretrained": ZOO, **given})


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(VtcError, match="unknown model 'tiny-llava-shape'.*tiny-llava-shapes"):
        Arguments.read({"pretrained": "tiny-llava-shape"}).load()


# ---------------------------------------------------------------------- settings of answers


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {"max_new_tokens": 9, "do_sample": False}),
        (
            {"max_new_tokens": 4, "temperature": 0, "top_p": None, "num_beams": 2},
            {"max_new_tokens": 4, "num_beams": 2, "do_sample": False},
        ),
        ({"do_sample": False, "temperature": 0.7, "top_k": 5}, {"do_sample": False}),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.5}, {"do_sample": False}),
        ({"temperature": 0.2, "top_p": 0.5}, {"temperature": 0.2, "top_p": 0.5, "do_sample": True}),
    ],
)
def test_settings_of_a_task(given: dict[str, Any], options: dict[str, Any]) -> None:
    assert Generation.read(given, 9).options == {"max_new_tokens": 9, **options}


def test_until_and_what_is_not_known() -> None:
    read = Generation.read({"until": ["\n\n", "", "END"], "image_aspect_ratio": "pad"}, 9)
    assert read.ignored == ("image_aspect_ratio",)
    assert [read.cut(t) for t in ("a END b\n\nc", "a\n\nEND", "ab", "")] == ["a ", "a", "ab", ""]
    assert Generation.read({"until": "x"}, 9).cut("axb") == "a"
    with pytest.raises(InvalidInput, match="num_return_sequences"):
        Generation.read({"num_return_sequences": 2}, 9)


# ---------------------------------------------------------------------- prompts


def test_placeholders_in_the_text_are_places(zoo: tuple[Any, Any]) -> None:
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    bare = SimpleNamespace(image_token="<image>", chat_template=None)
    prompt = Writer(bare).write(chat(red, blue, "see <image>, not <image>."))
    assert prompt.text == "see <image>, not <image>."
    assert [image.getpixel((0, 0)) for image in prompt.images] == [(255, 0, 0), (0, 0, 255)]
    prompt = Writer(bare).write(chat(red, "which", blue))
    assert prompt.text == "<image>which<image>"  # as they come
    with pytest.raises(InvalidInput, match="holds '<image>' 2 times.*prompt has 1"):
        Writer(bare).write(chat(red, "<image> <image>"))
    two = [*chat(red, "a"), Turn("assistant", (Part("text", "b"),))]
    with pytest.raises(UnsupportedModel, match="no chat template.*user, assistant"):
        Writer(bare).write(two)
    assert Writer(zoo[1]).write(chat(red, "what ?")).text == vtc_zoo.prompt("what ?")


def test_pictures_are_turned_as_they_were_held(zoo: tuple[Any, Any], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the right side is the bottom of the scene
    Image.new("RGB", (16, 8)).save(tmp_path / "held.jpg", exif=exif)
    for value in (str(tmp_path / "held.jpg"), Image.open(tmp_path / "held.jpg")):
        prompt = Writer(zoo[1]).write([Turn("user", (Part("image", value),))])
        assert prompt.images[0].size == (8, 16)


def test_media_that_cannot_be_read(zoo: tuple[Any, Any], tmp_path: Path) -> None:
    write = Writer(zoo[1]).write
    with pytest.raises(InvalidInput, match="'audio'; these are read: text, image, video"):
        Part("audio", "a.wav")
    with pytest.raises(InvalidInput, match="no such image: .*gone.png"):
        write([Turn("user", (Part("image", str(tmp_path / "gone.png")),))])
    with pytest.raises(InvalidInput, match="an image is a dict"):
        write(chat({"bytes": b""}))
    with pytest.raises(UnsupportedModel, match="LlavaProcessor has no video_token"):
        write(chat(tmp_path / "clip.mp4", "what ?"))


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize("keep", [None, 0.25])
def test_answers_are_those_of_generate(
    zoo: tuple[Any, Any], asked: Sequence[tuple[Image.Image, str, str]], keep: float | None
) -> None:
    model, processor = zoo
    chats = [chat(image, question) for image, question, _ in asked]
    chats.insert(3, chat("is there a red circle ?"))  # a text alone, in the same batch
    expected, session = [], None
    if keep is None:
        expected = [plain(*zoo, image, question) for image, question, _ in asked]
    else:
        with vtc.attach(model, "divprune", keep=keep):
            expected = [plain(*zoo, image, question) for image, question, _ in asked]
    expected.insert(3, plain(*zoo, None, "is there a red circle ?"))
    before = hooks(model)
    if keep is not None:
        session = vtc.attach(model, "divprune", keep=keep, strict=False)
    harness = ChatModel(model, processor, session)
    replies = harness.generate(chats, THREE)
    decoded = processor.tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert [reply.text for reply in replies] == decoded
    ends = [ids.index(2) + 1 if 2 in ids else 3 for ids in expected]  # 2 is </s>
    assert [reply.tokens_out for reply in replies] == ends
    words = [len(processor.tokenizer(vtc_zoo.prompt(q))["input_ids"]) for _, q, _ in asked]
    del replies[3]
    assert [reply.tokens_in for reply in replies] == [n + 143 for n in words]  # 144 patches
    harness.close()
    if session is None:
        assert [reply.text.strip() for reply in replies] == [answer for *_, answer in asked]
        assert harness.numbers() == {}
    else:
        numbers = harness.numbers()
        assert numbers["visual_tokens_before"] == 8 * 144 / 9
        assert numbers["visual_tokens_after"] == 8 * 36 / 9
        assert 0 < numbers["prefill_gflops"] < 0.5 * numbers["prefill_gflops_dense"]
        assert "divprune" in harness.report() and "25.0%" in harness.report()
    assert hooks(model) == before


def test_numbers_are_of_a_prompt_however_many_beams_search(
    zoo: tuple[Any, Any], asked: Sequence[tuple[Image.Image, str, str]]
) -> None:
    chats, found = [chat(image, question) for image, question, _ in asked[:2]], []
    own = zoo[0].generation_config
    before = own.num_beams
    try:
        for options, setting in (({}, 1), ({"num_beams": 3}, 1), ({}, 3)):
            own.num_beams = setting
            harness = ChatModel(*zoo, vtc.attach(zoo[0], "divprune", keep=0.25))
            harness.generate(chats, Generation({**THREE.options, **options}))
            found.append(harness.numbers())
            harness.close()
    finally:
        own.num_beams = before
    assert found[0]["visual_tokens_after"] == 36
    assert found[1] == found[2] == pytest.approx(found[0])


def test_steps_that_never_act_are_an_error_at_once(
    zoo: tuple[Any, Any], asked: Sequence[tuple[Image.Image, str, str]]
) -> None:
    idle = SimpleNamespace(stats=lambda: {"sites": [{"site": "vision.1", "runs": 0}]})
    harness = ChatModel(*zoo, idle)  # type: ignore[arg-type]
    harness.generate([chat("is there a red circle ?")], THREE)  # nothing could have acted
    with pytest.raises(NothingReduced, match="nothing was reduced at vision.1"):
        harness.generate([chat(*asked[0][:2])], THREE)


IMAGES = (
    "{% for m in messages %}{{ m['role'] + ' ' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_several_images_in_batches(family: str) -> None:
    """Prompts of one and two images, padded together, against the processor called by hand."""
    model, processor = video_models.model(family), video_models.processor(family)
    processor.chat_template = IMAGES
    pictures = [Image.fromarray(frame) for frame in video_models.frames(1, 3)]
    chats = [chat(pictures[0], "what left", pictures[1]), chat(pictures[2], "red ?")]
    texts = ["user <image> what left <image> assistant", "user <image> red ? assistant"]
    expected = []
    with vtc.attach(model, "divprune", keep=0.5) as session:
        for text, images in zip(texts, (pictures[:2], pictures[2:]), strict=True):
            inputs = processor(text=text, images=images, return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            new = out[0, inputs["input_ids"].shape[1] :]
            expected.append(processor.tokenizer.decode(new, skip_special_tokens=True))
        four = Generation.read({"max_new_tokens": 4}, 9)
        replies = ChatModel(model, processor, session).generate(chats, four)
    assert [reply.text for reply in replies] == expected


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two videos of 6 frames, 4 a second."""
    paths = [tmp_path_factory.mktemp("clips") / f"{seed}.mp4" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        vtc.video.write(path, video_models.frames(seed, 6), fps=4)
    return paths


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_videos_in_batches(family: str, clips: Sequence[Path]) -> None:
    model, processor = video_models.model(family), video_models.processor(family)
    chats = [chat(path, text) for path, text in zip(clips, ("what", "what moves"), strict=True)]
    expected, writer = [], Writer(processor)
    with vtc.attach(model, "random", keep=0.5) as session:
        for path, one in zip(clips, chats, strict=True):
            inputs = processed(processor, writer.write(one).text, vtc.video.read(path, 4))
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            new = out[0, inputs["input_ids"].shape[1] :]
            expected.append(processor.tokenizer.decode(new, skip_special_tokens=True))
        harness = ChatModel(model, processor, session, frames=4)
        four = Generation.read({"max_new_tokens": 4}, 9)
        replies = harness.generate(chats, four)
    assert [reply.text for reply in replies] == expected


# ---------------------------------------------------------------------- VLMEvalKit


@pytest.fixture
def compressed() -> Iterator[CompressedVLM]:
    model = CompressedVLM(
        pretrained=ZOO, method="divprune", keep=0.25, max_new_tokens=3, device="cpu"
    )
    yield model
    model.close()


def test_vlmevalkit_answers_are_those_of_generate(
    zoo: tuple[Any, Any],
    asked: Sequence[tuple[Image.Image, str, str]],
    compressed: CompressedVLM,
    tmp_path: Path,
) -> None:
    got, expected = [], []
    with vtc.attach(zoo[0], "divprune", keep=0.25):
        for number, (image, question, _) in enumerate(asked):
            path = str(tmp_path / f"{number}.png")
            image.save(path)
            parts = [{"type": "image", "value": path}, {"type": "text", "value": question}]
            got.append(compressed.generate_inner(parts, dataset="shapes"))
            ids = plain(*zoo, image, question)
            expected.append(zoo[1].decode(ids, skip_special_tokens=True).strip())
            assert compressed.generate([path, question], dataset="shapes") == got[-1]
    assert got == expected
    assert compressed.generate(question) == compressed.generate([question])  # a text alone
    talk = [{"role": "user", "content": [path, question]}]
    assert compressed.chat(talk) == got[-1]
    assert "25.0%" in compressed.report()


def test_what_vlmevalkit_asks_of_a_model(compressed: CompressedVLM) -> None:
    assert compressed.INTERLEAVE and not compressed.is_api and not compressed.VIDEO_LLM
    assert compressed.use_custom_prompt("MMBench") is False
    with pytest.raises(UnsupportedModel, match="builds none"):
        compressed.build_prompt({}, dataset="MMBench")
    with pytest.raises(InvalidInput, match="set_dump_image"):
        compressed.dump_image({"image": 1}, "MMBench")
    compressed.set_dump_image(lambda line: [line["image"]])
    assert compressed.dump_image({"image": "a.png"}, "MMBench") == ["a.png"]
    with pytest.raises(InvalidInput, match="give dictionaries such as"):
        compressed.generate_inner([{"image": "a.png"}])
    with pytest.raises(InvalidInput, match="does not know temprature"):
        CompressedVLM(pretrained=ZOO, generation={"temprature": 1})
    with pytest.raises(InvalidRecipe, match="leave out keep"):
        CompressedVLM(pretrained=ZOO, recipe=CONFIG, keep=0.5)


def test_vlmevalkit_says_how_videos_are_read(
    clips: Sequence[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = "llava_onevision"
    pair = video_models.model(family), video_models.processor(family)
    monkeypatch.setattr(Arguments, "load", lambda self: pair)
    model = CompressedVLM(
        pretrained="any/name", method="random", keep=0.5, frames=4, max_new_tokens=1
    )
    assert model.VIDEO_LLM and (model.nframe, model.fps) == (4, 1.0)
    message = [{"type": "video", "value": str(clips[0])}, {"type": "text", "value": "what"}]
    counted = []
    #: what the kit sets for data sets of 3 frames, and of 2 frames a second; first nothing
    for asked_for in ({}, {"nframe": 3, "fps": None}, {"nframe": None, "fps": 2}):
        for name, value in asked_for.items():
            setattr(model, name, value)
        model.generate(message)
        counted.append(model._chat.session.trace[-1].n_in[0])  # type: ignore[union-attr]
    model.close()
    # 4 tokens a frame (4 x 4 patches, pooled); of 6 frames 0, 2, 4, 5 at 2 a second
    assert counted == [4 * 4, 3 * 4, 4 * 4]
