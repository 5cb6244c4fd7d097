"""Every transformer of timm: does an attached session compute what it should, or does it say no?

Each registration is built as it is, with random weights and fewer blocks, on a small image. The
oracle knows nothing of vtc: it runs the untouched model on all tokens, and every softmax over
tokens, wherever it is called, leaves out those that were dropped."""

from __future__ import annotations

import argparse
import difflib
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import vtc

from ..errors import UnknownName, UnsupportedModel, VtcError
from . import records
from .options import names, prepare
from .records import Record

DEPTH = 3  # blocks of every model
GRID = (4, 6)  # patches of the images, where a model takes any size
TOLERANCE = 1e-4  # of the largest output
#: an oracle that hides tokens changes the output at least that much, or it was not asked
SEEN = 1e-3
PLAIN = ("VisionTransformer", "Eva", "Beit")
OTHERS = "other transformers"

#: modules of timm.models whose registrations are looked at
_FAMILIES = """
beit cait coat convit crossvit csatv2 davit deepseek_vit deit edgenext efficientformer
efficientformer_v2 efficientvit_mit efficientvit_msra eva gcvit gemma4_vit hiera hieradet_sam2
levit maxxvit mobilevit mvitv2 naflexvit nest nextvit pit pvt_v2 qwen3_vit swin_transformer
swin_transformer_v2 swin_transformer_v2_cr tiny_vit tnt twins visformer vision_transformer
vision_transformer_hybrid vision_transformer_relpos vision_transformer_sam vitamin volo xcit
"""

#: one of each kind of block, attention, position, prefix, pooling and embedding
_QUICK = """
test_vit2 test_vit3 test_vit4 test_vit_relpos aimv2_large_patch14_224 beit_base_patch16_224
cait_xxs24_224 convit_tiny deepseek_vit_412m_enc deit_tiny_distilled_patch16_224
eva02_base_patch16_clip_224 eva02_enormous_patch14_clip_224 swin_tiny_patch4_window7_224
vit_base_mci_224 vit_base_patch16_clip_quickgelu_224 vit_base_patch16_rpn_224
vit_base_patch16_sapiens2 vit_base_patch16_xp_224 vit_base_patch32_siglip_gap_256
vit_dpwee_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256 vit_little_patch16_reg4_gap_256
vit_pe_spatial_tiny_patch16_512 vit_pwee_patch16_reg1_gap_256 vit_relpos_small_patch16_rpn_224
vit_small_patch16_18x2_224 vit_small_patch16_rope_mixed_224 vit_srelpos_small_patch16_224
vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224 vitamin_small_224 xcit_nano_12_p16_224
"""

FAMILIES, QUICK = frozenset(_FAMILIES.split()), tuple(_QUICK.split())

EPILOG = """results:
  exact     attached with keep=1.0 the outputs are bit-equal; with half of the tokens they are those
            of the oracle, to 1e-4 of the largest output. tome: with r=0 bit-equal, with r=4 merged
            tokens stand for all that came in
  refused   `vtc.attach` said no, and why
  inexact   everything else; the exit code is 1

examples:
  vtc bench census --quick
  vtc bench census --json census.json
  vtc bench census --models vit_base_patch16_224,beit_base_patch16_224
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of `vtc bench census`."""
    prepare(parser, "Check every transformer that timm registers against a masking oracle.", EPILOG)
    parser.add_argument("--models", type=names, help="only these registrations")
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} of them, all kinds")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Check and print. 1 when a registration is inexact."""
    import timm

    torch.set_num_threads(1)
    chosen = args.models or (list(QUICK) if args.quick else registrations())
    known = timm.list_models()
    for name in set(chosen) - set(known):
        near = difflib.get_close_matches(name, known, n=1)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownName(f"timm {timm.__version__} registers no model named {name!r}.{guess}")
    rows = []
    for name in (bar := tqdm(chosen, desc="census", mininterval=1)):
        bar.set_postfix_str(name)
        rows.append(examine(name, args.seed))
    print("\n" + report(rows))
    if args.json:
        where = {**records.environment(torch.float32, args.seed), "timm": timm.__version__}
        records.write(args.json, rows, where)
    return int(any(row["result"] == "inexact" for row in rows))


def registrations() -> list[str]:
    """All names of the families."""
    import timm

    def family(name: str) -> str:
        return timm.model_entrypoint(name).__module__.rpartition(".")[2]

    return [name for name in timm.list_models() if family(name) in FAMILIES]


# ---------------------------------------------------------------------- one registration


def examine(name: str, seed: int) -> Record:
    """Build one model, attach, compare."""
    from ..adapters.encoder import ImageEncoder

    draft, options = shortened(name)
    kind = type(draft).__name__
    row: Record = {"model": name, "group": kind if kind in PLAIN else OTHERS, "class": kind}
    refusal = ImageEncoder.matches(draft)
    if refusal is not None:
        return {**row, "result": "refused", "reason": f"looked for {refusal}"}
    try:
        subject = make(name, draft, options, seed)
        row |= {"tokens": subject.patches, "blocks": type(subject.model.blocks[0]).__name__}
        return row | verdict(subject)
    finally:
        gc.collect()


def verdict(subject: Subject) -> Record:
    """Result and reason of dropping; `tome`: "exact", or why not."""
    dropping = asked(keeps_all, subject) or asked(equals_masking, subject)
    if dropping:
        return dropping
    merging = asked(merges, subject) or {"result": "exact", "reason": "exact"}
    if merging["result"] == "inexact":
        return {"result": "inexact", "reason": f"tome: {merging['reason']}"}
    return {"result": "exact", "reason": "", "tome": merging["reason"]}


def asked(check: Callable[[Subject], str], subject: Subject) -> Record | None:
    """None when a check passes."""
    try:
        with torch.inference_mode():
            wrong = check(subject)
    except VtcError as error:
        return {"result": "refused", "reason": str(error)}
    except Exception as error:  # a crash of any kind is a finding, the others go on
        wrong = f"{type(error).__name__}: {error}"
    return {"result": "inexact", "reason": wrong} if wrong else None


def shortened(name: str) -> tuple[Any, Record]:
    """The model without weights, and the options that cut it where its class counts blocks."""
    try:
        return built(name, "meta", depth=DEPTH), {"depth": DEPTH}
    except (TypeError, ValueError, AssertionError):  # a depth per stage, or lists per block
        whole = built(name, "meta")
    attentions = [getattr(block, "attn", None) for block in getattr(whole, "blocks", ())]
    heads = [getattr(attention, "num_kv_heads", None) for attention in attentions]
    if None in heads or not heads:
        return whole, {}
    middle = len(heads) // 2
    cut = {"depth": DEPTH, "num_kv_heads": (heads[0], *heads[middle : middle + DEPTH - 1])}
    return built(name, "meta", **cut), cut


@dataclass(frozen=True)
class Subject:
    """A model to check: image [2, 3, H, W] of `patches` patches, its untouched output `dense`."""

    model: Any
    images: Tensor
    patches: int
    dense: Tensor


def make(name: str, draft: Any, options: Record, seed: int) -> Subject:
    """The model with weights, on the smallest image that it takes; `draft` is it without."""
    embed = draft.patch_embed
    stride = [side // n for side, n in zip(embed.img_size, embed.grid_size, strict=True)]
    size = tuple(step * n for step, n in zip(stride, GRID, strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = built(name, "cpu", img_size=size, **options)
        except (TypeError, ValueError, AssertionError):  # made for one size
            size = tuple(embed.img_size)
            model = built(name, "cpu", **options)
        randomise(model)
        images = torch.randn(2, 3, *size)
    height, width = model.patch_embed.grid_size
    with torch.inference_mode():
        return Subject(model, images, height * width, model(images))


def built(name: str, device: str, **options: Any) -> Any:
    """The registered model, with random weights."""
    import timm

    with torch.device(device):
        return timm.create_model(name, pretrained=False, **options).eval()


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Fresh heads, biases, layer scales and bias tables are constant, or nearly: nothing shows."""
    for parameter in model.parameters():
        if parameter.std(correction=0) < 5e-3:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


# ---------------------------------------------------------------------- checks: "" or what is wrong


def keeps_all(subject: Subject) -> str:
    with vtc.attach(subject.model, "random", keep=1.0, at="vision.1"):
        ours = subject.model(subject.images)
    return "" if torch.equal(ours, subject.dense) else "not bit-equal"


def equals_masking(subject: Subject) -> str:
    with vtc.attach(subject.model, "random", keep=0.5, at="vision.1") as session:
        ours = subject.model(subject.images)
    keep = torch.zeros(len(ours), subject.patches, dtype=torch.bool)
    keep.scatter_(1, session.trace[-1].source, True)
    if keep.sum().item() != len(ours) * (subject.patches // 2):
        return f"{keep.sum().item()} of {keep.numel()} tokens were kept"
    expected = oracle(subject.model, subject.images, keep)
    if distance(expected, subject.dense) < SEEN:
        return "hiding half of the tokens changes nothing, so the oracle tells nothing"
    off = distance(ours, expected)
    return "" if off <= TOLERANCE else f"{off:.1e} from the oracle"


def merges(subject: Subject) -> str:
    """ToMe with nothing to merge is bit-equal; merged tokens stand for all that came in."""
    with vtc.attach(subject.model, "tome", r=0):
        if not torch.equal(subject.model(subject.images), subject.dense):
            return "r=0 is not bit-equal"
    with vtc.attach(subject.model, "tome", r=4) as session:
        out = subject.model(subject.images)
    sizes = [t.plan.size for t in session.trace if t.plan is not None and t.plan.size is not None]
    if not sizes:
        return "r=4 merged nothing"
    total = sizes[-1].sum(1)
    if not torch.equal(total, torch.full_like(total, subject.patches)):
        return f"r=4: sizes add up to {total.tolist()} of {subject.patches}"
    return "" if bool(out.isfinite().all()) else "r=4 is not finite"


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value of b; infinite when a shape differs."""
    if a.shape != b.shape:
        return float("inf")
    return ((a - b).abs().max() / b.abs().max()).item()


# ---------------------------------------------------------------------- oracle


def oracle(model: Any, images: Tensor, keep: Tensor) -> Tensor:
    """Output of the model whose blocks from the second on, and whose head, see the patches
    keep [B, N] (and the prefix) only."""
    keep = F.pad(keep, (model.num_prefix_tokens, 0), value=True)
    with Hiding(keep) as hiding, entered(model.blocks[1], hiding):
        full = model.forward_features(images)
        hiding.active = False
        short = torch.stack([x[k] for x, k in zip(full, keep, strict=True)])
        out = model.forward_head(short)
    if hiding.hits < len(model.blocks) - 1:
        raise UnsupportedModel(f"the oracle met {hiding.hits} softmaxes over tokens")
    return out


@contextmanager
def entered(block: nn.Module, hiding: Hiding) -> Iterator[None]:
    """`hiding` becomes active when the block is reached."""

    def switch(*_: Any) -> None:
        hiding.active = True

    handle = block.register_forward_pre_hook(switch)
    try:
        yield
    finally:
        handle.remove()


class Hiding(TorchFunctionMode):
    """While active, a softmax over tokens, fused or not, leaves out those not in keep [B, N]."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.bias = torch.where(keep, 0.0, float("-inf"))[:, None, None]
        self.active, self.hits = False, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        n = self.bias.shape[-1]
        if self.active and func is F.scaled_dot_product_attention and args[1].shape[-2] == n:
            self.hits += 1
            mask = kwargs.pop("attn_mask", None)
            mask = self.bias if mask is None else mask + self.bias
            return func(*args, attn_mask=mask, **kwargs)
        if self.active and getattr(func, "__name__", "") == "softmax" and args[0].shape[-1] == n:
            self.hits += 1
            return func(args[0] + self.bias, *args[1:], **kwargs)
        return func(*args, **kwargs)


# ---------------------------------------------------------------------- report


def report(rows: Sequence[Record]) -> str:
    """Counts per group, then who is refused or inexact and why."""
    groups = [g for g in (*PLAIN, OTHERS) if any(row["group"] == g for row in rows)]
    counts = [tally(g, [row for row in rows if row["group"] == g]) for g in groups]
    plain = [row for row in rows if row["group"] in PLAIN]
    if plain:
        counts.append(tally(" + ".join(g for g in groups if g in PLAIN), plain))
    tables = [records.table(counts, COUNTS)]
    kinds = {
        "refused": [row for row in rows if row["result"] == "refused"],
        "tome refused": [r for r in rows if r["result"] == "exact" and r["tome"] != "exact"],
        "inexact": [row for row in rows if row["result"] == "inexact"],
    }
    tables += [f"{kind}:\n\n{listed(some)}" for kind, some in kinds.items() if some]
    return "\n\n".join(tables)


def listed(rows: Sequence[Record]) -> str:
    """One line per reason and class."""
    alike: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        reason = row["reason"] or row["tome"]
        alike.setdefault((row["class"], reason), []).append(row["model"])
    lines = [
        {"class": kind, "count": len(some), "reason": reason, "models": ", ".join(some)}
        for (kind, reason), some in sorted(alike.items())
    ]
    return records.table(lines, {"class": "", "count": "", "reason": "", "models": ""})


def tally(group: str, rows: Sequence[Record]) -> Record:
    found = Counter(row["result"] for row in rows)
    return {
        "group": group,
        "registrations": len(rows),
        **{result: found[result] for result in ("exact", "refused", "inexact")},
        "share_exact": found["exact"] / len(rows),
        "tome_exact": sum(row.get("tome") == "exact" for row in rows) / len(rows),
    }


COUNTS: dict[str, Any] = {
    "group": "",
    "registrations": "",
    "exact": "",
    "refused": "",
    "inexact": "",
    "share_exact": ".1%",
    "tome_exact": ".1%",
}
