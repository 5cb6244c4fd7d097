"""Merged tokens at the edge of a picture that a model cut into padded tiles.

Inside the tower a merged token sits at the place of one of those it was made of. Behind the
projector LLaVA-NeXT and its relatives remove the places that hold padding only. A token of which
another place shows a part of the picture goes there instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..units import GridUnits, Units


def inside_the_picture(
    now: Callable[[], Units | None], pack: Callable[..., Any]
) -> Callable[..., Any]:
    """`pack_image_features` that loses no merged token; `now` gives the units of the tower's run.

    Only where something was merged: the packing then runs once more, on numbers of places.
    """
    signature = inspect.signature(pack)

    @wraps(pack)
    def called(*args: Any, **kwargs: Any) -> Any:
        units, given = now(), signature.bind(*args, **kwargs)
        views: Any = given.arguments.get("image_features")
        if isinstance(units, GridUnits) and units.merged and _made_of(units, views):
            stays = _places_that_stay(pack, given.arguments, views, units.original[0])
            moved = _moved(units, torch.cat(list(views)), stays)
            given.arguments["image_features"] = moved.split([len(view) for view in views])
        return pack(*given.args, **given.kwargs)

    return called


def _made_of(units: Units, views: Any) -> bool:
    """The features [views, n, D] of every picture are of these units."""
    if not isinstance(views, list | tuple) or not all(getattr(v, "ndim", 0) == 3 for v in views):
        return False
    return all(v.shape[1] == units.original[0] for v in views) and sum(map(len, views)) == len(
        units.original
    )


def _places_that_stay(
    pack: Callable[..., Any], given: dict[str, Any], views: Sequence[Tensor], n: int
) -> Tensor:
    """[all views, n] True for places whose features the packing hands on as they are. Pictures
    that it resizes have none: each of their features is spread over several."""
    total = sum(map(len, views)) * n
    number = torch.arange(total, device=views[0].device).reshape(-1, n, 1).double()
    told = given | {"image_features": number.split([len(view) for view in views])}
    if told.get("image_newline") is not None:
        told["image_newline"] = number.new_full((1,), total)
    packed = pack(**told)
    packed = packed[0] if isinstance(packed, tuple) else packed
    stays = torch.zeros(total + 1, dtype=torch.bool, device=number.device)
    for tokens in packed:
        found = tokens.reshape(-1)
        whole = (found == found.round()).all()
        stays[torch.where(whole, found, total).long()] = True
    return stays[:-1].reshape(-1, n)


def _moved(units: Units, features: Tensor, stays: Tensor) -> Tensor:
    """Features [R, n, D], zero where no token is left, with those at the last place that stays of
    the places each token was made of; tokens without such a place do not move."""
    members = units.members()
    n, device = members.shape[1], members.device
    place = torch.arange(n, device=device).expand_as(members)
    best = torch.full_like(units.source, -1).scatter_reduce(
        1, members.clamp(min=0), torch.where(stays & (members >= 0), place, -1), "amax"
    )
    best = torch.where((best < 0) | stays.gather(1, units.source), units.source, best)
    rows = torch.arange(len(members), device=device)[:, None]
    out = features.new_zeros(len(features), n + 1, features.shape[-1])
    where = torch.where(units.real, best, n)  # padding goes where it is cut off
    return out.index_put((rows, where), features[rows, units.source])[:, :n]
