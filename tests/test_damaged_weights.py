"""Weights that are damaged, of another model, of another dtype or not finite: every loader of them
refuses every kind with one class of error, whose text names the file and what is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vtc_zoo
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vtc
from vtc.commands import cli
from vtc.errors import InvalidInput, InvalidWeights, VtcError
from vtc.modules.flexdit import SparseDense
from vtc.modules.langdc import DynamicCompressor, Settings, stand_in
from vtc.modules.lookup_side import LookupSides
from vtc.modules.lookupvit import LookupViT
from vtc.modules.stts import TokenScorer
from vtc.modules.weights import load_pretrained, load_weights, save_weights

SCENE = Path(__file__).parents[1] / "demos" / "pictures" / "scene_1.png"
TABLE = [[1.0, 1.0], [0.5, 0.25]]
LANGDC = Settings((1,), (2,), (3,), base_projector="linear", max_len=4)


@dataclass(frozen=True)
class Loader:
    """write: puts good weights into an empty folder and returns the file. load: of that file.

    foreign: another library builds the model, and leaves alone what it has no place for.
    """

    write: Callable[[Path], Path]
    load: Callable[[Path], Any]
    foreign: bool = False


def scorer() -> TokenScorer:
    return TokenScorer(8, 2, 12)


def recoveries() -> SparseDense:
    return SparseDense(6, ("pool", "generate", "recover", "dense"))


def sides() -> LookupSides:
    return LookupSides([Host(), Host()])


class Host(nn.Module):
    """As much of a ViT block as side weights start from."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(8), nn.MultiheadAttention(8, 2)


def network() -> LookupViT:
    return LookupViT(img_size=(8, 8), patch_size=(4, 4), dim=8, depth=1, heads=2, grids=((1, 1),))


def saved(make: Callable[[], Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        make().save(folder / "own.safetensors")
        return folder / "own.safetensors"

    return write


def in_folder(save: Callable[[Path], None], name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save(folder)
        return folder / name

    return write


def of_zoo(name: str, file: str = "model.safetensors") -> Callable[[Path], Path]:
    return in_folder(lambda to: shutil.copytree(vtc_zoo.path(name), to, dirs_exist_ok=True), file)


def table(folder: Path) -> Path:
    save_file({"table": torch.tensor(TABLE)}, folder / "table.safetensors")
    return folder / "table.safetensors"


def read_table(file: Path) -> Any:
    return vtc.Recipe.build("scheduled_cache", 2, table=str(file)).steps[0].build()


def run(file: Path) -> None:
    """`vtc run`, whose message is raised again."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", SimpleNamespace(write=lines.append, flush=lambda: None))
        code = cli.main(
            ["run", "--model", str(file.parent), "--image", str(SCENE), "--prompt", "how many?"]
            + ["--method", "grid", "--keep", "0.5", "--device", "cpu"]
        )
    told = "".join(lines)
    assert (code == 1) == ("vtc: " in told) and "Traceback" not in told, told
    if code:
        raise InvalidWeights(told)


LOADERS = {
    "stts": Loader(saved(scorer), lambda file: scorer().load(file)),
    "flexdit": Loader(saved(recoveries), lambda file: recoveries().load(file)),
    "lookupvit": Loader(saved(sides), lambda file: sides().load(file)),
    "langdc": Loader(
        in_folder(stand_in(8, LANGDC).save, "langdc.safetensors"),
        lambda file: DynamicCompressor.load(file.parent),
    ),
    "scheduled_cache": Loader(table, read_table),
    "LookupViT": Loader(
        in_folder(network().save_pretrained, "model.safetensors"),
        lambda file: LookupViT.from_pretrained(file.parent),
    ),
    "LookupViT as stored": Loader(
        in_folder(network().save_pretrained, "model.safetensors"),
        lambda file: LookupViT.from_pretrained(file.parent, None),
    ),
    "zoo, LookupViT": Loader(
        in_folder(network().save_pretrained, "model.safetensors"),
        lambda file: vtc_zoo.load_folder(file.parent),
    ),
    "zoo, timm": Loader(of_zoo("tiny-vit-fmnist"), lambda file: vtc_zoo.load_folder(file.parent)),
    "zoo, transformers": Loader(
        of_zoo("tiny-llava-shapes"), lambda file: vtc_zoo.load_folder(file.parent), True
    ),
    "zoo, diffusers": Loader(
        of_zoo("tiny-dit-digits", "diffusion_pytorch_model.safetensors"),
        lambda file: vtc_zoo.load_folder(file.parent),
        True,
    ),
    "vtc run": Loader(of_zoo("tiny-llava-shapes"), run, True),
}


# ---------------------------------------------------------------------- what can go wrong


def changed(change: Callable[[dict[str, Tensor], str], Any]) -> Callable[[Path, str], None]:
    """Tensors of a file changed, its settings left."""

    def damage(file: Path, name: str) -> None:
        from safetensors import safe_open

        with safe_open(str(file), "pt") as before:
            about = before.metadata()
        state = {n: v.clone() for n, v in load_file(file).items()}
        change(state, name)
        save_file(state, file, metadata=about)

    return damage


def put(value: float) -> Callable[[dict[str, Tensor], str], Any]:
    return lambda state, name: state[name].view(-1)[-1:].fill_(value)


def cut(file: Path, name: str) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def garbled(file: Path, name: str) -> None:
    """The header no longer says what lies where."""
    data = bytearray(file.read_bytes())
    data[12:24] = b"\xff" * 12
    file.write_bytes(data)


def pickled(file: Path, name: str) -> None:
    torch.save({name: torch.zeros(2)}, file)


def replaced(content: bytes) -> Callable[[Path, str], None]:
    return lambda file, name: file.write_bytes(content) and None


def folder(file: Path, name: str) -> None:
    file.unlink()
    file.mkdir()


#: what was done -> how, and the words that tell; {} stands for the weight's name
DAMAGES: dict[str, tuple[Callable[[Path, str], Any], str]] = {
    "int8": (
        changed(lambda state, name: state.update({name: state[name].to(torch.int8)})),
        "do not fit.*(1 of a dtype that is not cast, the first is {}: int8|holds .*int8)",
    ),
    "bool": (
        changed(lambda state, name: state.update({name: state[name] > 0})),
        "do not fit.*(1 of a dtype that is not cast, the first is {}: bool|holds .*bool)",
    ),
    "float8": (
        changed(lambda state, name: state.update({name: state[name].to(torch.float8_e4m3fn)})),
        "do not fit.*(1 of a dtype that is not cast, the first is {}: (F8|float8)|holds .*float8)",
    ),
    "nan": (changed(put(float("nan"))), "hold NaN or infinity: 1 not finite, the first is {}"),
    "infinity": (changed(put(float("-inf"))), "hold NaN or infinity: 1 not finite, .* is {}"),
    "missing": (changed(lambda state, name: state.pop(name)), "do not fit.*({}|holds {{}})"),
    "renamed": (
        changed(lambda state, name: state.update({f"new.{name}x": state.pop(name)})),
        "do not fit.*(1 missing, the first is {}|holds .'new)",
    ),
    "another shape": (
        changed(lambda state, name: state.update({name: torch.zeros(3, dtype=state[name].dtype)})),
        r"do not fit.*(1 of another shape, the first is {}: \(3,\) there|holds .*\[3\])",
    ),
    "cut off": (cut, "cannot read weights from .*. Give a safetensors file"),
    "garbled": (garbled, "cannot read weights from .*. Give a safetensors file"),
    "empty": (replaced(b""), "cannot read weights from .*. Give a safetensors file"),
    "text": (replaced(b"no weights at all"), "cannot read weights from .*. Give a safetensors"),
    "pickled": (pickled, "cannot read weights from .* it is a pickle, .* which may hold code"),
    "absent": (lambda file, name: file.unlink(), "(cannot read weights from|no weights of) '.*"),
    "a folder": (folder, "(cannot read weights from|no weights of) '.*"),
}


def pick(file: Path) -> str:
    """A weight that is no scalar and tied to no other, as files of every loader have one."""
    return max(name for name, value in load_file(file).items() if value.numel() > 1)


def known(name: str) -> str:
    """How errors may name it: libraries put other paths in front."""
    return rf"[\w.]*{name.rpartition('.')[2]}"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_refuses_every_damage(loader: str, damage: str, tmp_path: Path) -> None:
    case, (harm, words) = LOADERS[loader], DAMAGES[damage]
    file = case.write(tmp_path)
    name = pick(file)
    harm(file, name)
    with pytest.raises(InvalidWeights, match=words.format(known(name))) as error:
        case.load(file)
    assert str(tmp_path) in str(error.value)
    assert isinstance(error.value, VtcError) and isinstance(error.value, InvalidInput)


@pytest.mark.parametrize("loader", LOADERS)
def test_weights_that_nobody_asked_for(loader: str, tmp_path: Path) -> None:
    """Refused, but where another library builds the model, which may have parts that are not ours
    to know."""
    case = LOADERS[loader]
    file = case.write(tmp_path)
    changed(lambda state, _: state.update({"more.weight": torch.zeros(2)}))(file, "")
    if case.foreign or loader == "scheduled_cache":
        case.load(file)
        return
    with pytest.raises(InvalidWeights, match=r"1 too many, the first is more.weight \(2,\)"):
        case.load(file)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_with_a_fraction_are_cast(loader: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = LOADERS[loader]
    file = case.write(tmp_path)
    changed(lambda state, _: state.update({n: v.to(dtype) for n, v in state.items()}))(file, "")
    case.load(file)


# ---------------------------------------------------------------------- what else is told


def test_numbers_that_the_models_dtype_does_not_hold(tmp_path: Path) -> None:
    file = saved(scorer)(tmp_path)
    changed(put(1e6))(file, "query.weight")
    scorer().load(file)
    with pytest.raises(InvalidWeights, match="1 not finite in float16, the first is query.weight"):
        scorer().half().load(file)
    full = scorer().bfloat16()
    full.load(file)
    assert full.query.weight[-1, -1] == 999424 and full.query.weight.dtype == torch.bfloat16


def test_what_was_refused_changed_nothing(tmp_path: Path) -> None:
    module, file = scorer(), saved(scorer)(tmp_path)
    before = {n: v.clone() for n, v in module.state_dict().items()}
    changed(put(float("nan")))(file, "out.bias")
    with pytest.raises(InvalidWeights):
        module.load(file)
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())


class Counting(nn.Module):
    """Integers of its own beside its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("ids", torch.arange(3))


def read(module: nn.Module) -> Callable[..., Any]:
    """A `from_pretrained` that casts whatever it finds."""

    def load(source: Path, **_: Any) -> tuple[nn.Module, dict[str, Any]]:
        state = load_file(source / "model.safetensors")
        left = module.load_state_dict(state, strict=False)
        return module, {"missing_keys": left.missing_keys, "mismatched_keys": []}

    return load


def test_integers_that_a_model_has_itself(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_weights(Counting(), file, {})
    load_weights(Counting(), file)
    load_pretrained(read(Counting()), tmp_path)
    changed(lambda state, _: state.update({"ids": state["ids"].float()}))(file, "")
    with pytest.raises(InvalidWeights, match="dtype that is not cast, the first is ids: float32"):
        load_weights(Counting(), file)
    changed(lambda state, _: state.update({"linear.weight": torch.ones(2, 2).char()}))(file, "")
    with pytest.raises(InvalidWeights, match="not cast, the first is linear.weight: int8"):
        load_pretrained(read(Counting()), tmp_path)
    quantised = Counting()
    quantised.config.quantization_config = {"bits": 8}
    load_pretrained(read(quantised), tmp_path)  # there integers are meant


@pytest.mark.parametrize("damage", ["fine", "nan", "int8", "cut off", "code"])
def test_weights_that_torch_saved(damage: str, tmp_path: Path) -> None:
    """A folder of `pytorch_model.bin`, which is read without running what it holds."""
    old = of_zoo("tiny-llava-shapes")(tmp_path)
    state, file = {n: v.clone() for n, v in load_file(old).items()}, tmp_path / "pytorch_model.bin"
    old.unlink()
    name = max(state)
    if damage == "nan":
        state[name].view(-1)[0] = float("nan")
    if damage == "int8":
        state[name] = state[name].to(torch.int8)
    torch.save(state if damage != "code" else {name: print}, file)
    if damage == "fine":
        assert vtc_zoo.load_folder(tmp_path)[0].dtype == torch.float32
        return
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-5000])
    words = {
        "nan": "hold NaN or infinity: 1 not finite",
        "int8": "1 of a dtype that is not cast, the first is .*: int8",
        "cut off": "cannot read weights from .*: it is damaged, or a pickle of more than tensors",
        "code": "cannot read weights from .*: it is damaged, or a pickle of more than tensors",
    }
    with pytest.raises(InvalidWeights, match=words[damage]):
        vtc_zoo.load_folder(tmp_path)


FOLDERS = {
    "LookupViT": ("LookupViT", "config.json"),
    "zoo, LookupViT": ("zoo, LookupViT", "config.json"),
    "zoo, timm": ("zoo, timm", "config.json"),
    "langdc": ("langdc", "langdc.json"),
}


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000, "null", "absent", "bytes"])
@pytest.mark.parametrize("loader", FOLDERS)
def test_settings_that_cannot_be_read(loader: str, content: str, tmp_path: Path) -> None:
    case, name = FOLDERS[loader]
    file = LOADERS[case].write(tmp_path)
    settings = tmp_path / name
    settings.write_bytes(b"\xff\xfe" if content == "bytes" else content.encode())
    if content == "absent":
        settings.unlink()
    with pytest.raises(InvalidWeights, match=f"{name}'.*(no JSON object)?.* Give a folder as it"):
        LOADERS[case].load(file)


@pytest.mark.parametrize(
    ("loader", "key", "value", "words"),
    [
        ("LookupViT", "dim", "wide", "describes no model that can be built: "),
        ("LookupViT", "patch_size", 4, "describes no model that can be built: "),
        ("LookupViT", "heads", 3, "describes no model.*dim=8 does not split into heads=3"),
        ("LookupViT", "colour", 3, "describes no model.*no option colour"),
        ("LookupViT", "depth", 2, r"do not fit this model: \d+ missing, the first is blocks.1"),
        ("zoo, timm", "arguments", {"depth": "x"}, "describes no model that can be built: "),
        ("langdc", "settings", {"eos": []}, "describes no model that can be built: "),
        ("langdc", "width", "wide", "describes no model that can be built: ValueError"),
        ("langdc", "width", 9, "do not fit this model.*of another shape"),
        ("langdc", "lm", {"model_type": "none"}, "describes no model that can be built: "),
        ("langdc", "lora", 7, "describes no model that can be built: "),
    ],
)
def test_settings_of_no_model(
    loader: str, key: str, value: Any, words: str, tmp_path: Path
) -> None:
    case, name = FOLDERS[loader]
    file, settings = LOADERS[case].write(tmp_path), tmp_path / name
    about = json.loads(settings.read_text())
    assert key in about or key == "colour"
    settings.write_text(json.dumps(about | {key: value}))
    with pytest.raises(InvalidWeights, match=words):
        LOADERS[case].load(file)


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_settings_of_a_foreign_model_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    file = LOADERS["zoo, transformers"].write(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InvalidWeights, match="config.json"):
        vtc_zoo.load_folder(tmp_path)
    with pytest.raises(InvalidWeights, match="vtc: cannot load "):
        run(file)


def test_methods_refuse_them_before_a_model_is_touched(tmp_path: Path) -> None:
    model = vtc_zoo.load("tiny-vit-fmnist")[0]
    with vtc.attach(model, "lookupvit", grid=(2, 2), strict=False) as session:
        session.modules["vision.0"].save(tmp_path / "a.safetensors")
    changed(put(float("nan")))(tmp_path / "a.safetensors", "blocks.0.gather_q.weight")
    with pytest.raises(InvalidWeights, match="not finite, the first is blocks.0.gather_q.weight"):
        vtc.attach(model, "lookupvit", grid=(2, 2), weights=str(tmp_path / "a.safetensors"))
    vtc.attach(model, "grid", keep=0.5, at="vision.1").detach()  # nothing was left behind
