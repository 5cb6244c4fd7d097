"""The command `vtc`. Heavy imports happen inside the commands, so that `vtc --help` is quick."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..budget import Keep
from ..errors import (
    InvalidBudget,
    InvalidQuestions,
    InvalidRecipe,
    MissingSignal,
    UnknownName,
    UnsupportedSite,
    VtcError,
    storage,
)
from ..video import cli as videoqa
from ..web import serve as web
from . import outputs
from .loading import (
    FORMATS,
    UsageError,
    encode,
    load_model,
    model_structure,
    open_image,
    source_of,
    value_of,
)

OK, FAILED, USAGE, PARTLY, STOPPED = 0, 1, 2, 3, 130
#: what the exit code of every command means
CODES = {
    OK: "done",
    FAILED: "the run failed, or what it checks is not so",
    USAGE: "typed wrongly: an option, a name, or a file that cannot be used; nothing was run",
    PARTLY: "done, but items were left out, which are named",
    STOPPED: "stopped by Ctrl-C",
    143: "vtc videoqa: stopped by SIGTERM",
}

#: `vtc bench NAME` -> module with configure(parser) and run(args) -> exit code, and its help
BENCHES = {
    "quality": ("vtc.bench.quality", "right answers against tokens kept, method by method"),
    "speed": ("vtc.bench.speed", "time against tokens kept, and the limit no method can beat"),
    "stages": ("vtc.bench.stages", "time of every stage of a method, from pixels to decoding"),
    "memory": ("vtc.bench.memory", "peak memory of choosing tokens, and of attention with mass"),
    "census": ("vtc.bench.census", "every transformer of timm: exact, or refused with a reason"),
    "videoqa": ("vtc.bench.videoqa", "questions about videos per second, and memory of a long run"),
    "dit": ("vtc.bench.dit", "time of diffusion transformers with fewer tokens"),
    "vit": ("vtc.bench.vit", "time of image encoders that merge or drop, against the dense model"),
    "loyalty": ("vtc.bench.loyalty", "how far answers stay the same, on your own pictures"),
}
#: the same for `vtc plot NAME`
PLOTS = {
    "pareto": (
        "vtc.plot.pareto",
        "draw scores over FLOPs, time or tokens, from what benches wrote",
    ),
    "layers": ("vtc.plot.layers", "draw how many visual tokens every layer works on"),
    "kept": ("vtc.plot.kept", "draw which patches of an image stay, recipe by recipe"),
}
ZOO_MODEL = "tiny-llava-shapes"


#: names, as torch is not imported for them
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")
TYPED = (
    *(UsageError, UnknownName, UnsupportedSite, MissingSignal),
    *(InvalidBudget, InvalidRecipe, InvalidQuestions),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code, one of `CODES`."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run_words(words)
    except KeyboardInterrupt:
        code = _tell("stopped", STOPPED)
    except VtcError as error:
        if "--debug" in words:
            raise
        code = _tell(str(error), USAGE if isinstance(error, TYPED) else FAILED)
    except OSError as error:
        if "--debug" in words:
            raise
        told = isinstance(error, BrokenPipeError) or not _printed()
        code = FAILED if told else _tell(storage(error), FAILED)
    except (MemoryError, RuntimeError) as error:
        if "--debug" in words or type(error).__name__ not in OUT_OF_MEMORY:
            raise
        why = str(error).partition("\n")[0].rstrip(".") or "there is no more"
        told = f"too little memory: {why}. Ask for less at once, or take another device."
        code = _tell(told, FAILED)
    return code if _printed() else code or FAILED


def _run_words(words: list[str]) -> int:
    try:
        args = _parser().parse_args(words)
    except SystemExit as stop:  # argparse has printed help (0) or what is wrong (2)
        return stop.code if isinstance(stop.code, int) else USAGE
    return args.run(args)


def _tell(what: str, code: int) -> int:
    """One line of stderr."""
    print(f"vtc: {' '.join(what.split())}", file=sys.stderr)
    return code


def _printed() -> bool:
    """Whether all that was printed could be written; if not, that is said once."""
    out = sys.stdout
    if out is None:  # the shell has closed it
        return True
    try:
        out.flush()
        return True
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())  # Python flushes at its end
        if not isinstance(error, BrokenPipeError):  # which is `vtc list | head`
            _tell(storage(error, "write", "standard output"), FAILED)
        return False


# ---------------------------------------------------------------------- commands


def _list(args: argparse.Namespace) -> int:
    from . import tables

    for path in (args.check, args.write):
        if path is not None and not path.is_file():
            raise UsageError(f"no such file: {path}")
    if args.write is not None:
        outputs.check_file(args.write)
    if args.check is not None:
        tables.check(args.check)
        print(f"{args.check}: the tables are current")
    elif args.write is not None:
        changed = tables.write(args.write)
        print(f"{args.write}: {'tables refreshed' if changed else 'the tables were current'}")
    else:
        print(tables.listing(args.families, args.markdown))
    return OK


def _show(args: argparse.Namespace) -> int:
    from .tables import method_page

    print(method_page(args.method))
    return OK


def _describe(args: argparse.Namespace) -> int:
    from .. import describe

    print(describe(model_structure(args)))
    return OK


def _run(args: argparse.Namespace) -> int:
    from .. import attach

    request = _request(args)
    images = [open_image(path) for path in args.image]
    model, processor = load_model(args)
    inputs = encode(processor, args.prompt, images).to(model.device, model.dtype)

    def answer() -> str:
        ids = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return processor.decode(new, skip_special_tokens=True).strip()

    with attach(model, **request) as session:  # first: what is wrong shows before any work
        compressed = answer()
    print(f"dense:       {answer()}\ncompressed:  {compressed}\n\n{session.report()}")
    if args.picture is not None:
        from .. import draw

        seen = draw.as_seen(processor, inputs.get("pixel_values"))
        draw.save(draw.prompt_picture(images, seen, session.trace), args.picture)
    return OK


def _videoqa(args: argparse.Namespace) -> int:
    source_of(args.model)  # a name that is not known shows before any work
    compress = args.method is not None or args.recipe is not None
    loose = _request(args)
    alone = [name for name in loose if name != "method"]
    if not compress and alone:
        raise UsageError(f"{', '.join(alone)} without a method: give --method or --recipe too.")
    return videoqa.run(args, loose if compress else None, load_model)


def _demo(args: argparse.Namespace) -> int:
    others = ("out", "quick", "questions") if args.web else ("host", "port")
    given = ", ".join(f"--{name}" for name in others if getattr(args, name) is not None)
    if given:
        told = "is not for the web page: leave --web out" if args.web else "needs --web"
        raise UsageError(f"vtc demo: {given} {told}, or leave {given} out.")
    if args.web:
        return web.run(args)
    from . import demo

    out, quick = args.out or demo.OUT, bool(args.quick)
    outputs.check_folder(out)
    return demo.run(*load_model(args), out, args.questions, quick)


def _zoo_list(args: argparse.Namespace) -> int:
    import vtc_zoo

    for name in vtc_zoo.names():
        try:
            print(f"{name}  {vtc_zoo.path(name)}")
        except FileNotFoundError as error:
            print(f"{name}  not there: {error}")
    return OK


def _zoo_scenes(args: argparse.Namespace) -> int:
    from vtc_zoo.shapes import write_scenes

    with outputs.writing(args.out):
        listing = write_scenes(args.out, args.n, args.seed)
    print(f"{args.n} scenes, listed in {listing}")
    return OK


def _zoo_clips(args: argparse.Namespace) -> int:
    from vtc_zoo.moving import write_clips

    with outputs.writing(args.out):
        listing = write_clips(args.out, args.n, args.seed)
    print(f"{args.n} clips, listed in {listing}")
    return OK


def _request(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `attach`."""
    names = ("keep", "at", "merge", "mass", "seed")
    given = {n: v for n in names if (v := getattr(args, n)) is not None} | dict(args.param)
    if args.recipe is None:
        return {"method": args.method, **given}
    if given:
        raise UsageError(f"a recipe already says everything: leave out {', '.join(given)}.")
    return {"method": args.recipe}


# ---------------------------------------------------------------------- arguments


class _Lazy(argparse.ArgumentParser):
    """Asks its module, where it has one, for the options only when its command was typed."""

    module = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.module and self.get_default("run") is None:
            try:
                code = importlib.import_module(self.module)
            except ModuleNotFoundError as error:
                raise VtcError(f"`{self.prog}` cannot start: {error}.") from error
            code.configure(self)
            self.set_defaults(run=code.run)
        return super().parse_known_args(args, namespace)


def _keep(text: str) -> Keep:
    if text == "auto":
        return "auto"
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        wanted = "give a share like 0.25, a token count like 64, or auto"
        raise argparse.ArgumentTypeError(f"{text!r}: {wanted}") from None


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1 on")
    return int(text)


def _param(text: str) -> tuple[str, Any]:
    key, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE")
    try:
        return key, value_of(key, value)
    except InvalidRecipe as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _command(
    where: Any, name: str, run: Callable[..., int] | None, about: str, *examples: str
) -> Any:
    new = where.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog="examples:\n" + "\n".join(f"  vtc {e}" for e in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    new.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if run is not None:
        new.set_defaults(run=run)
    return new


def _model_options(new: Any, *flags: str, **extra: Any) -> None:
    new.add_argument(*flags, metavar="MODEL", help="zoo name, folder or hub id", **extra)
    new.add_argument("--trust-remote-code", action="store_true", help="run code of the model repo")


def _method_options(new: Any, required: bool) -> None:
    either = new.add_mutually_exclusive_group(required=required)
    either.add_argument("--method", metavar="M", help="a name of `vtc list`")
    either.add_argument("--recipe", type=Path, metavar="YAML", help="a file such as in configs/")
    new.add_argument(
        "--keep", type=_keep, metavar="K", help="share (0.25), token count (64) or auto"
    )
    new.add_argument(
        "--at",
        action="append",
        metavar="SITE",
        help="such as vision.1, projector, decoder.2, cache",
    )
    new.add_argument("--merge", choices=("none", "nearest"), help="average dropped tokens in")
    new.add_argument("--mass", type=float, help="0 to 1: attention for what a token stands for")
    new.add_argument("--seed", type=int, help="for methods that draw")
    new.add_argument(
        "--param",
        type=_param,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the method, see `vtc show METHOD`; more than once if need be",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vtc",
        description="Make vision-language models process fewer visual tokens.",
        epilog="start with: vtc demo\n\nexit codes:\n"
        + "\n".join(f"  {code:<4} {meaning}" for code, meaning in CODES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vtc {__version__}")
    group: dict[str, Any] = {"title": "commands", "metavar": "COMMAND", "required": True}
    top = parser.add_subparsers(parser_class=_Lazy, **group)

    about = "list the methods, or the model families"
    new = _command(top, "list", _list, about, "list", "list --families", "list --write README.md")
    new.add_argument("--families", action="store_true", help="model families instead of methods")
    new.add_argument("--markdown", action="store_true", help="as a table for a README")
    either = new.add_mutually_exclusive_group()
    either.add_argument("--check", type=Path, metavar="README", help="fail when not current")
    either.add_argument("--write", type=Path, metavar="README", help="refresh between its markers")

    about = "print versions: what is installed, what was tested, what is missing"
    _command(top, "env", None, about, "env").module = "vtc.commands.env"

    new = _command(top, "show", _show, "show all about one method", "show divprune")
    new.add_argument("method", metavar="METHOD", help="a name of `vtc list`")

    about = "show the sites, signals and methods that a model supports (reads no weights)"
    examples = (ZOO_MODEL, "org/name", "timm/vit_base_patch16_224", "open_clip/ViT-B-32")
    new = _command(top, "describe", _describe, about, *(f"describe {name}" for name in examples))
    _model_options(new, "model")

    sample = f"run --model {ZOO_MODEL} --image demos/pictures/scene_1.png \\\n      --prompt "
    sample += "'how many green objects are there ?'"
    one = f"{sample} --method divprune --keep 0.25 --picture out/kept.png"
    two = f"{sample} --recipe configs/divprune_10_merge_mass.yaml"
    new = _command(top, "run", _run, "answer a prompt, dense and compressed", one, two)
    _model_options(new, "--model", required=True)
    new.add_argument("--image", type=Path, nargs="+", required=True, metavar="FILE")
    new.add_argument("--prompt", required=True, metavar="TEXT")
    _method_options(new, required=True)
    new.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")
    new.add_argument("--device", help="default: cuda when there is one, else cpu")
    new.add_argument(
        "--picture",
        type=outputs.picture(tuple(FORMATS), parents=True),
        metavar="PNG",
        help="draw which patches were kept",
    )

    about = "answer questions about videos, in bulk; goes on where it was killed"
    new = _command(top, "videoqa", _videoqa, about)
    _model_options(new, "--model", required=True)
    _method_options(new, required=False)
    videoqa.configure(new)

    about = "compare all methods on a small trained model: answers, tokens, FLOPs, a picture"
    examples = ("demo", "demo --quick", "demo --out out/", "demo --web", "demo --web --port 8000")
    new = _command(top, "demo", _demo, about, *examples)
    new.add_argument("--out", type=outputs.folder, help="folder for the picture, default out")
    new.add_argument(
        "--quick", action="store_true", default=None, help="fewer questions and budgets"
    )
    new.add_argument(
        "--questions", type=_positive, metavar="N", help="default 120, with --quick 12"
    )
    new.add_argument("--model", default=ZOO_MODEL, help="another training of the same model")
    new.set_defaults(trust_remote_code=False, device="cpu")
    web.configure(new)

    about = "find the cheapest recipe that keeps the answers to your own pictures"
    _command(top, "tune", None, about, "tune --help").module = "vtc.tune.command"

    zoo = _command(top, "zoo", None, "the small trained models and their data", "zoo list")
    inner = zoo.add_subparsers(**group)
    _command(inner, "list", _zoo_list, "list the small trained models", "zoo list")
    for what, make in (("scenes", _zoo_scenes), ("clips", _zoo_clips)):
        sample, about = f"zoo make-{what} --out out/s --n 20", f"draw {what} with questions"
        new = _command(inner, f"make-{what}", make, about, sample)
        new.add_argument("--out", type=outputs.folder, required=True, metavar="DIR")
        new.add_argument("--n", type=_positive, default=20, help="how many (default 20)")
        new.add_argument("--seed", type=int, default=7, help="default 7: the test set")

    about = "measure quality, speed and memory"
    bench = _command(top, "bench", None, about, "bench speed --help")
    about = "draw results, and what methods keep, as pictures"
    plot = _command(top, "plot", None, about, "plot pareto --help", "plot kept --help")
    for where, word, modules in ((bench, "bench", BENCHES), (plot, "plot", PLOTS)):
        inner = where.add_subparsers(parser_class=_Lazy, **group)
        for name, (module, about) in modules.items():
            _command(inner, name, None, about, f"{word} {name} --help").module = module
    return parser
