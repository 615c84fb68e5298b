"""Decides where the prompts of a site are added: in a torch hook, or in a wrapper of a callable.

Usually a torch hook ("hook") adds them before the module runs. Two features need another place, and
both may be enabled before or after the patch is attached:

- The block caches of diffusers (`enable_cache`) replace the module's `forward` and may skip the
  module. The prompts are then added "inside", around the innermost forward, so that a skipped
  block gets none.
- A module that is compiled by itself (`compile_repeated_blocks`) would have the hook in its graph,
  so that each site would need a graph of its own. The prompts are then added "outside", before the
  compiled code, so that all blocks share the graphs of the plain model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dmp_common.attach.wrapping import Wrapping, is_wrapped, unwrap

if TYPE_CHECKING:
    from dmp_common.attach.call import SiteHook

REGISTRY = "_diffusers_hook"  # diffusers keeps here what replaces a module's forward
COMPILED = "_compiled_call_impl"  # `Module.compile` sets it, and torch then calls it


class Around(Wrapping):
    """A wrapper that adds a site's prompts to the arguments of the module's callable."""

    owner: SiteHook

    def __init__(self, owner: SiteHook, inner: Any) -> None:
        super().__init__(owner, inner)
        self.__wrapped__ = inner  # `inspect.signature` follows it, and diffusers calls that

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        site = self.owner
        changed = site.before(site.module(), args, kwargs)
        args, kwargs = (args, kwargs) if changed is None else changed
        output = self.inner(*args, **kwargs)
        if site.prepends:
            stripped = site.after(site.module(), args, output)
            output = output if stripped is None else stripped
        return output


def moved(site: SiteHook) -> bool:
    """Tells whether the prompts of a site must now be added at another place than before."""
    if site.where != _wanted(site):
        return True
    if site.where == "hook":
        return not site.handles
    holder, name = _holder(site)
    return not is_wrapped(getattr(holder, name), site)


def settle(site: SiteHook) -> None:
    """Installs the hook or the wrapper of a site at the place where it is needed now."""
    remove(site)
    site.where = _wanted(site)
    if site.where != "hook":
        holder, name = _holder(site)
        setattr(holder, name, Around(site, getattr(holder, name)))
        return
    module = site.module()
    site.handles.append(module.register_forward_pre_hook(site.before, with_kwargs=True))
    if site.prepends:
        site.handles.append(module.register_forward_hook(site.after))


def remove(site: SiteHook) -> None:
    """Removes the hook or the wrapper of a site, wherever it is."""
    for handle in site.handles:
        handle.remove()
    site.handles.clear()
    module = site.module()
    if module is None:
        return
    own = vars(module)
    if COMPILED in own:
        unwrap(module, COMPILED, site)
    for reference in own[REGISTRY]._fn_refs if REGISTRY in own else ():
        unwrap(reference, "original_forward", site)
        unwrap(reference, "forward", site)
    if "forward" in own:  # diffusers has put it back here after its cache was disabled
        unwrap(module, "forward", site)
    site.where = None


def _wanted(site: SiteHook) -> Any:
    own = vars(site.module())
    if REGISTRY in own and own[REGISTRY]._fn_refs:
        return "inside"
    return "hook" if own.get(COMPILED) is None else "outside"


def _holder(site: SiteHook) -> tuple[Any, str]:
    """Returns the object and the name of its attribute whose callable is to be wrapped."""
    if site.where == "outside":
        return site.module(), COMPILED
    innermost = vars(site.module())[REGISTRY]._fn_refs[0]
    return innermost, "forward" if innermost.original_forward is None else "original_forward"
