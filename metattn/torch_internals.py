"""torch's own functions that it does not document: each with why it is needed and what would replace it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import coerce_cinterpreter, temporarily_clear_interpreter_stack
from torch.autograd import Function, forward_ad
from torch.autograd.function import _SingleLevelFunction

# Function.apply binds default arguments first, 70 µs a call, and hands the call to functorch's interpreters,
# which make a class for each. Replaced by: an autograd Function of C++ in the stable ABI.
_bare_apply = torch._C._FunctionBase.__dict__["apply"]
_is_wrapped = _functorch.is_functorch_wrapped_tensor
_TORCHS_OWN = {Tensor, torch.nn.Parameter, type(None)}


class SingleLevelFunction(_SingleLevelFunction):
    """An autograd Function for apply_function alone.

    From torch 2.14 on the bare apply too hands a Function to functorch's interpreters, by its class.
    Replaced by: as above.
    """

    _compiled_autograd_key = staticmethod(Function._compiled_autograd_key)


def transformed() -> bool:
    """Whether a transform of torch.func is active. Replaced by: a public question of this kind."""
    return torch._C._are_functorch_transforms_active()


def batched_in_backward(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a tensor is batched by is_grads_batched or vectorize=True, torch's older vmap.

    Functions of autograd lose their graph within it; operators do not. Replaced by: torch.func.vmap there.
    """
    return any([x is not None and _functorch.is_legacy_batchedtensor(x) for x in tensors])


def no_autocast() -> bool:
    """Whether autocast is off on all devices, if it can be told at once. Replaced by: a public question."""
    return not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled()


def watched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a dispatch mode, or a tensor of a class of its own, sees the operators that are called."""
    return torch._C._len_torch_dispatch_stack() > 0 or not {type(x) for x in tensors} <= _TORCHS_OWN


def recorded_below() -> bool:
    """Whether what runs is being recorded as operators by torch.jit.trace."""
    return torch._C._get_tracing_state() is not None


def any_dual(tensors: Sequence[Any]) -> bool:
    """Whether a tensor has a tangent of forward mode.

    torch.autograd.forward_ad knows of a level only if it opened it; what Dynamo makes opens them otherwise.
    Replaced by: a public question of this kind.
    """
    if forward_ad._current_level < 0 and not (
        transformed() and _functorch.peek_interpreter_stack().key() == _functorch.TransformType.Jvp
    ):
        return False
    return any(isinstance(x, Tensor) and _may_be_dual(x) for x in tensors)


def _may_be_dual(x: Tensor) -> bool:
    """Of tensors of torch's older vmap it cannot be asked: a node is made, whose jvp is taken if it is so."""
    return _of_older_vmap(x) or tangent_of(x) is not None


def _of_older_vmap(x: Tensor) -> bool:
    """Whether a tensor is batched by it, within whichever wrappers of torch.func."""
    while _is_wrapped(x):
        x = _functorch.get_unwrapped(x)
    return _functorch.is_legacy_batchedtensor(x)


_forward_ad_globals = forward_ad.__dict__  # a dict of ours: of torch's modules Dynamo guards nothing


def duals_from_outside() -> bool:
    """For code that is being compiled: whether it may be given dual numbers. What is read here Dynamo guards.

    A torch.func.jvp inside of what is compiled has opened a level too; within another one torch refuses that.
    """
    return not _jvp_at_work() and _forward_ad_globals["_current_level"] >= 0  # type: ignore[no-any-return]


def _jvp_at_work() -> bool:
    interpreters = _functorch.get_interpreter_stack() or []
    return any(each.key() == _functorch.TransformType.Jvp for each in interpreters)


# Asked while Dynamo traces, whose stack of transforms is torch's own.
_jvp_at_work._dynamo_marked_constant = True  # type: ignore[attr-defined]


def tangent_of(x: Tensor) -> Tensor | None:
    """A tensor's tangent on this level: torch has one of forward mode, functorch wraps its own around it."""
    return torch._VF._unpack_dual(x, level=0).tangent  # type: ignore[no-any-return, attr-defined]


def with_tangent(x: Tensor, tangent: Tensor) -> Tensor:
    """A tensor with a tangent on this level."""
    return torch._VF._make_dual(x, tangent, level=0)  # type: ignore[no-any-return, attr-defined]


def without_tangent(x: Tensor) -> Tensor:
    """A tensor without its tangent on this level."""
    if _of_older_vmap(x):  # for which unpacking is not implemented
        with forward_ad._set_fwd_grad_enabled(False):  # type: ignore[no-untyped-call]
            return x.clone()
    return torch._VF._unpack_dual(x, level=0).primal  # type: ignore[no-any-return, attr-defined]


def recording(tensors: Sequence[Any]) -> bool:
    """Whether a derivative of a function of these tensors is asked for, in reverse or forward mode."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
        return True
    return any_dual(tensors)


def differentiated_or_mapped(x: Tensor) -> bool:
    """Whether a tensor's value alone would lose a derivative that is asked for, or an example of a vmap."""
    if torch.compiler.is_compiling():
        return x.requires_grad and torch.is_grad_enabled()
    return recording([x]) or _is_wrapped(x) or _functorch.is_legacy_batchedtensor(x)


def below_autograd() -> AbstractContextManager[None]:
    """Within it operators are called without their derivatives.

    Replaced by: redispatch from a kernel of the stable ABI.
    """
    return torch._C._AutoDispatchBelowAutograd()  # type: ignore[no-any-return, attr-defined]


def alive(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Tensors without the wrappers of transforms that have ended, which may have been kept beyond them."""
    return [x if x is None or not _is_wrapped(x) else _functorch.unwrap_if_dead(x) for x in tensors]


def countable(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Tensors as autograd may keep them: of those made in inference mode, which count no changes, copies.

    A copy is as large as what lies in memory: what was expanded stays so.
    """
    if not any([x is not None and x.is_inference() for x in tensors]):
        return tensors
    return [_copied(x) if x is not None and x.is_inference() else x for x in tensors]


def _copied(x: Tensor) -> Tensor:
    once = x
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size > 1 and stride == 0:
            once = once.narrow(dim, 0, 1)
    return once.clone().expand(x.shape)


def apply_function(function: Any, *arguments: Any) -> Any:
    """An autograd Function's node made on the current level of torch.func alone, or of eager PyTorch.

    Its tensors have to be alive. Its forward has to go on below autograd, by an operator: that meets the
    transforms further out.
    """
    if not transformed():
        return _bare_apply(function, *arguments)
    before = _functorch.get_single_level_autograd_function_allowed()
    _functorch.set_single_level_autograd_function_allowed(True)
    _caller.modes = (torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled())
    try:
        return _bare_apply(function, *arguments)
    finally:
        _functorch.set_single_level_autograd_function_allowed(before)


class _Caller(threading.local):
    """Whether reverse and forward mode were on where a Function was applied last."""

    modes = (True, True)


_caller = _Caller()


@contextmanager
def outer_levels() -> Iterator[None]:
    """In a Function's forward both modes of differentiation are off; the transforms further out need them.

    They are as they were where the Function was applied. To be entered first thing in a forward.
    """
    reverse, forward = _caller.modes
    with torch.set_grad_enabled(reverse), forward_ad._set_fwd_grad_enabled(forward):  # type: ignore[no-untyped-call]
        yield


def outermost_of_derivatives(tensors: Sequence[Tensor | None]) -> bool:
    """In a Function's forward under a transform: whether nobody further out asks for a derivative.

    That is so at torch.func's first level, without forward mode, where the tensors within the wrappers need
    no gradient. Replaced by: a dispatcher that asks before it calls Python.
    """
    if _functorch.current_level() != 1 or forward_ad._current_level >= 0:
        return False
    reverse, _ = _caller.modes
    bare = [_functorch.get_unwrapped(x) if x is not None and _is_wrapped(x) else x for x in tensors]
    return not (reverse and torch._C._any_requires_grad(*bare))


def forward_mode() -> AbstractContextManager[None]:
    """Within a Function's jvp forward mode is off; the tangents of an outer jvp would be lost.

    With it on again, a saved tensor must lose its tangent of this level, the one that is being propagated.
    """
    return forward_ad._set_fwd_grad_enabled(True)  # type: ignore[no-any-return, no-untyped-call]


def with_strides_of(x: Tensor, like: Tensor | None) -> Tensor:
    """x, as `like` lies in memory (None: contiguous) where sizes are symbols; else as it is.

    torch wants a tangent to lie as its output does. It makes a copy that does where it must, but of symbolic
    sizes fails to (_new_zeros_with_same_feature_meta). Replaced by: a torch that can.
    """
    if not any(isinstance(size, torch.SymInt) for size in x.shape):
        return x
    if like is None:
        return x.contiguous()
    strides = like.stride()
    order = sorted(range(x.dim()), key=lambda dim: strides[dim], reverse=True)
    places = [order.index(dim) for dim in range(x.dim())]
    return x.permute(order).contiguous().permute(places)


def demanded(node: Any, inputs: Sequence[Any], needed: Sequence[bool]) -> tuple[bool, ...]:
    """needs_input_grad of a Function's inputs, without what the running backward pass does not go on to.

    autograd.grad(y, x) runs a node for some of its inputs; ctx names all that could have a gradient.
    Replaced by: a ctx that knows.
    """
    functions = iter(node.next_functions)  # of the inputs that are tensors
    sources = [next(functions)[0] if isinstance(x, Tensor) else None for x in inputs]
    return tuple([need and _runs(source) for need, source in zip(needed, sources, strict=True)])


def _runs(function: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(function)
    except RuntimeError:  # a leaf that autograd.grad was asked for: the question is refused
        return True


# torch.func.vmap, seen from an operator's batching rule. torch.library.register_vmap does the same with more
# work a call.


def unbatched(tensors: Sequence[Any]) -> tuple[list[Any], list[int | None], int]:
    """Tensors without the dimension of the innermost vmap, where that was (None: nowhere), and its level."""
    level = _functorch.current_level()
    bare: list[Any] = []
    dims: list[int | None] = []
    for x in tensors:
        inner, dim = _functorch._unwrap_batched(x, level) if isinstance(x, Tensor) else (x, None)
        bare.append(inner)
        dims.append(dim)
    return bare, dims, level


def batched(x: Tensor, dim: int | None, level: int) -> Tensor:
    """A tensor whose dimension is that of the vmap of this level."""
    return x if dim is None else _functorch._add_batch_dim(x, dim, level)


def beyond_vmap() -> AbstractContextManager[None]:
    """Within a batching rule: operators go on to the transforms further out."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
    return torch._C._ExcludeDispatchKeyGuard(keys)  # type: ignore[no-any-return]


class Vmap(NamedTuple):
    """A torch.func.vmap that is at work. Replaced by: a public question of this kind."""

    level: int
    size: int
    randomness: str


def vmaps_at_work() -> list[Vmap] | None:
    """Of torch.func, the innermost first; None where another transform is among them."""
    found = []
    for each in reversed(_functorch.get_interpreter_stack() or []):
        if each.key() != _functorch.TransformType.Vmap:
            return None
        vmap: Any = coerce_cinterpreter(each)
        found.append(Vmap(each.level(), vmap.batch_size(), vmap.randomness()))
    return found


def beyond_transforms() -> AbstractContextManager[Any]:
    """Within it no transform of torch.func is at work. Replaced by: a compiler that accepts them outside."""
    return temporarily_clear_interpreter_stack()


def without_dim(x: Tensor, level: int) -> tuple[Tensor, int | None]:
    """A tensor without the wrapper of a vmap, and where its dimension is then; None: nowhere."""
    inner, dim = _functorch._unwrap_batched(x, level)
    return inner, dim


def legacy_depth() -> int:
    """How many of torch's older vmaps are nested here."""
    depth: int = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return depth


def legacy_unbatched(x: Tensor, level: int) -> Tensor:
    """A tensor with a level's dimension in front; of size 1 where it has none."""
    return torch._remove_batch_dim(x, level, 1, 0)  # type: ignore[no-any-return, attr-defined]


def legacy_batched(x: Tensor, level: int) -> Tensor:
    """The inverse."""
    return torch._add_batch_dim(x, 0, level)  # type: ignore[no-any-return, attr-defined]


def mark_size(x: Tensor) -> None:
    """The first size of a tensor may differ between calls of one compiled graph.

    Replaced by: a public function of this kind.
    """
    torch._dynamo.maybe_mark_dynamic(x, 0)


def many_graphs() -> AbstractContextManager[None]:
    """Within it a function may be compiled for as many models as a process has; torch's limit is 8 graphs.

    Replaced by: torch.compile(recompile_limit=…), which not all our versions of torch have.
    """
    return torch._dynamo.config.patch(recompile_limit=64)  # type: ignore[no-any-return, no-untyped-call]


def leave_uncompiled(function: Any) -> None:
    """Dynamo traces a function mode's method inside of what calls it, but compiles it alone for no one.

    After a graph break it would, without a guard on the function that the mode is asked about, and the next
    one would get the graph of another. Replaced by: that guard.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None:
        dynamo.skip_code(function.__code__)
