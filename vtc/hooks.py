"""What a session puts on the modules of others: hooks, methods that are wrapped, calls it follows.

A model belongs to its user. While a session lives, other libraries may wrap the same methods or put
their own in place of ours (offloading does, again and again), copy modules, replace them, or be
interrupted at any instruction. What is put here survives that or says so, and leaves a model as its
user left it, not as it was at attach."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from functools import update_wrapper, wraps
from types import MethodType
from typing import Any, NoReturn, Protocol

import torch
from torch import nn

from .adapters.slot import Slot
from .errors import UnsupportedModel

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Removable(Protocol):
    def remove(self) -> None:
        """Undo. Called again after an interrupt, so a second call does no harm."""
        ...


class _Ours:
    """Something of a session that lives in the attributes of a module."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedModel(
            "a vtc session is attached to this model, and sessions cannot be pickled: detach it "
            "first (vtc.detach(model)), or save model.state_dict()."
        )


def _nothing(*_: Any) -> None:
    """What a hook is in a copy of its module."""


class Hook(_Ours):
    """A hook on one module. `session` is None for hooks that no session owns."""

    def __init__(self, module: nn.Module, call: Callable[..., Any], session: Any) -> None:
        self.module, self.call, self.session = module, call, session

    def __call__(self, *args: Any) -> Any:
        if args[0] is not self.module and "_is_replica" in vars(args[0]):
            raise UnsupportedModel(
                "nn.DataParallel runs replicas of this model, which a session does not know: use "
                "one process per device (DistributedDataParallel), with a session in each, or "
                "detach it (vtc.detach(model))."
            )
        return self.call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def remove(self) -> None:
        # by what is there, not by a handle: an interrupt may come before a handle is at hand
        m = self.module
        for hooks, kinds in (
            (m._forward_pre_hooks, (m._forward_pre_hooks_with_kwargs,)),
            (m._forward_hooks, (m._forward_hooks_with_kwargs, m._forward_hooks_always_called)),
        ):
            for key in [key for key, hook in hooks.items() if hook is self]:
                for kind in kinds:
                    kind.pop(key, None)
                hooks.pop(key, None)


class _Method(_Ours):
    """The attribute of an instance that stands for one of its methods."""

    def __init__(self, wrapped: Wrapped, before: Any) -> None:
        self.wrapped, self.before = wrapped, before
        self.original: Callable[..., Any] = getattr(wrapped.owner, wrapped.name)
        update_wrapper(self, self.original, updated=())  # others read its signature
        self.call = wrapped.around(self.original)

    @property
    def __code__(self) -> Any:
        """torch.export asks where a forward is defined."""
        return self.original.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The method of the copied instance, as it would be without us."""
        owner = self.wrapped.owner
        if self.before is not None or id(owner) not in memo:
            return copy.deepcopy(self.original, memo)
        return MethodType(getattr(type(owner), self.wrapped.name), memo[id(owner)])


class Wrapped:
    """A method of one object that is wrapped while this lives. The instance gets an attribute, the
    class stays as it is.

    Others may put a method of their own over ours, or in its place. `settle` puts ours on top
    again; the one that theirs may still call passes everything on from then.
    """

    def __init__(
        self, owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        self.owner, self.name, self.around = owner, name, around
        self.ours: _Method | None = None

    def settle(self) -> None:
        own, last = vars(self.owner), self.ours
        if last is not None and own.get(self.name) is last:
            return
        if last is not None:
            last.call = last.original
        self.ours = _Method(self, own.get(self.name))
        own[self.name] = self.ours

    def remove(self) -> None:
        own = vars(self.owner)
        for name, value in list(own.items()):  # theirs may hold ours by another name
            if isinstance(value, _Method) and value.wrapped is self:
                if name == self.name and value.before is None:
                    own.pop(name, None)
                else:
                    own[name] = value.original
        if self.ours is not None:  # where it cannot be reached it passes everything on
            self.ours.call = self.ours.original


class Followed:
    """Calls of a module from beginning to end, whoever puts a `forward` in place of ours meanwhile.

    `forward` is wrapped, which also sees a call of it alone and ends with every interrupt; where
    somebody else's runs instead, hooks before and after it do the same.

    Args:
        enter: positional and keyword arguments of a call -> those to use.
        leave: what the call returned -> what it should return; given None when it failed.
    """

    def __init__(
        self,
        enter: Callable[[Args, Kwargs], tuple[Args, Kwargs]],
        leave: Callable[[Any], Any],
        settle: Callable[[], None],
    ) -> None:
        self.enter, self.leave, self.settle = enter, leave, settle

    def before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self in _entered.get():  # that call was interrupted
            self.after(module, args, None)
        self.settle()
        args, kwargs = self.enter(args, kwargs)
        _entered.set((*self._others(), self))
        return args, kwargs

    def around(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self in _entered.get():
                _entered.set(self._others())
            else:  # it was called by itself, not the module
                self.settle()
                args, kwargs = self.enter(args, kwargs)
            output = None
            try:
                output = original(*args, **kwargs)
            finally:
                output = self.leave(output)
            return output

        return call

    def after(self, module: nn.Module, args: Args, output: Any) -> Any:
        if self not in _entered.get():
            return None
        _entered.set(self._others())
        return self.leave(output)

    def _others(self) -> tuple[Followed, ...]:
        return tuple(call for call in _entered.get() if call is not self)


class Installed:
    """All that one session has put on objects of others. `remove` takes it away, also what an
    interrupted `install` has left: everything is noted here before it is put there."""

    def __init__(self, session: Any = None) -> None:
        self.session = session
        self._items: list[Removable] = []
        self._wrapped: list[Wrapped] = []
        #: the way from the model to every module that something was put on: children of a parent,
        #: name, module
        self._ways: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._paths: list[str] = []
        self._lock = threading.Lock()

    def add(self, item: Removable) -> None:
        self._items.append(item)

    def before(
        self, module: nn.Module, call: Callable[..., Any], *, keywords: bool = False
    ) -> None:
        """Hook before the forward of a module: call(module, args), with keywords=True also kwargs;
        it returns None or what the forward is given instead."""
        self.add(hook := Hook(module, call, self.session))
        module.register_forward_pre_hook(hook, with_kwargs=keywords)

    def after(
        self,
        module: nn.Module,
        call: Callable[..., Any],
        *,
        keywords: bool = False,
        first: bool = False,
        always: bool = False,
    ) -> None:
        """Hook after the forward of a module: call(module, args, output), with keywords=True
        (module, args, kwargs, output). first: before those that are there already; always: after
        an exception too."""
        self.add(hook := Hook(module, call, self.session))
        module.register_forward_hook(hook, prepend=first, with_kwargs=keywords, always_call=always)

    def wrap(
        self, owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        """Wrap a method of one object: around(original) stands in its place."""
        self.add(wrapped := Wrapped(owner, name, around))
        self._wrapped.append(wrapped)
        wrapped.settle()

    def follow(
        self,
        module: nn.Module,
        enter: Callable[[Args, Kwargs], tuple[Args, Kwargs]],
        leave: Callable[[Any], Any],
        name: str = "forward",
    ) -> None:
        """See `Followed`. name: another method to follow in place of `forward`."""
        calls = Followed(enter, leave, self.settle)
        if name == "forward":
            self.before(module, calls.before, keywords=True)
            self.after(module, calls.after, first=True, always=True)
        self.wrap(module, name, calls.around)

    def seal(self, model: nn.Module) -> None:
        """Everything is in place: note where in the model that is."""
        parents: dict[int, tuple[nn.Module, str, str]] = {}
        for path, parent in model.named_modules():
            for name, child in parent._modules.items():
                if child is not None:
                    parents.setdefault(id(child), (parent, name, f"{path}.{name}".lstrip(".")))
        seen = set[int]()
        owners = [item.module for item in self._items if isinstance(item, Hook)]
        owners += [w.owner for w in self._wrapped if isinstance(w.owner, nn.Module)]
        for module in owners:
            while id(module) in parents and id(module) not in seen and module is not model:
                seen.add(id(module))
                parent, name, path = parents[id(module)]
                self._ways.append((parent._modules, name, module))
                self._paths.append(path)
                module = parent

    def settle(self) -> None:
        """At the beginning of a call of the model: wrap again what others have replaced.

        Raises: `UnsupportedModel` when modules were replaced, so that hooks sit on old ones.
        """
        if torch.compiler.is_compiling():
            return
        for wrapped in self._wrapped:
            if vars(wrapped.owner).get(wrapped.name) is not wrapped.ours:
                with self._lock:
                    wrapped.settle()
        for number, (children, name, module) in enumerate(self._ways):
            if children.get(name) is not module:
                new = type(children.get(name)).__name__
                raise UnsupportedModel(
                    f"{self._paths[number]} of this model is now another module ({new}; it was "
                    f"{type(module).__name__}), as adding, merging or removing adapters may do, "
                    f"and the hooks of the vtc session are on the old one. Change the model first, "
                    f"then attach: vtc.detach(model) ends this session."
                )

    def remove(self) -> None:
        """Take everything away, whatever interrupts it; the first interrupt goes on afterwards."""
        first: BaseException | None = None
        while self._items:
            try:
                self._items[-1].remove()  # once more when it was interrupted: that does no harm
                self._items.pop()
            except KeyboardInterrupt as error:
                first = first or error
            except Exception as error:
                first = first or error
                self._items.pop()
        self._wrapped, self._ways = [], []
        if first is not None:
            raise first


#: calls of modules that a hook has entered and that nothing has left
_entered: Slot[tuple[Followed, ...]] = Slot("vtc_entered", ())


def sessions_on(modules: Iterable[nn.Module]) -> list[Any]:
    """The sessions that have hooks on these modules."""
    hooks = (
        hook
        for module in modules
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    )
    found = {id(h.session): h.session for h in hooks if isinstance(h, Hook)}
    return [session for session in found.values() if session is not None]


def refuse_second(modules: Iterable[nn.Module]) -> None:
    """Raise when hooks of a session are on one of these modules."""
    if sessions_on(modules):
        raise UnsupportedModel(
            "a vtc session is already attached to this model. Detach it first (its `detach()`, or "
            "vtc.detach(model)), or put all steps in one recipe."
        )
