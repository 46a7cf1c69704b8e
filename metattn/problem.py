"""Problem: everything about a call that is no tensor; validation happens here, once.

`dense` and `packed` turn what a user passed into the canonical form (Problem, Primals, Constants), which
autodiff and every backend take. What is wrong is refused here, before a kernel is launched or a value read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from metattn import torch_internals as internals

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QKV = ("q", "k", "v")
Causal = bool | Literal["top-left", "bottom-right"]
Number = float | Tensor  # one of no dimension


class Primals(NamedTuple):
    """The differentiable tensors of a call; the type of tangents and gradients too (any may be None then)."""

    q: Tensor  # [B, Hq, N, d] any strides
    k: Tensor  # [B, Hkv, M, d]
    v: Tensor  # [B, Hkv, M, dv] same dtype and device as q
    bias: Tensor | None  # [1|B, 1|Hq, 1|N, 1|M], never expanded by us; its dtype may differ from q's
    sinks: Tensor | None  # [1|B, Hq] compute dtype (float64 for float64 inputs, else float32)
    slopes: Tensor | None  # [1|B, Hq] ALiBi slopes, compute dtype


class Constants(NamedTuple):
    """The tensors of a call that are never differentiated."""

    mask: Tensor | None  # bool [1|B, 1|Hq, 1|N, 1|M], True = attends
    rng: (
        Tensor | None
    )  # int64 [B, 2]: dropout seed and Philox batch index of each batch; None without dropout
    cu_q: Tensor | None  # int32 [S+1] for packed sequences, with cu_k
    cu_k: Tensor | None


NO_CONSTANTS = Constants(None, None, None, None)


class Results(NamedTuple):
    """What forward gives; also the type of its tangents, which jvp gives."""

    o: Tensor  # [B, Hq, N, dv] in q's dtype
    # float64, as every row statistic between the maps: [B, Hq, N, 2], a reference score and the log of
    # Σ exp(S − reference), (0, −inf) where nothing is attended; as a tangent [B, Hq, N], the log's
    lse: Tensor
    o_lo: Tensor | None = None  # what rounding o to its dtype lost; the reference needs none


@dataclass(frozen=True)
class Problem:
    """Everything about a call that is no tensor; hashable."""

    scale: float
    softcap: float | None  # c > 0
    causal: str | None  # None | "top-left" | "bottom-right"
    window: tuple[int, int]  # (left, right), -1 = unlimited
    dropout_p: float  # in [0, 1]
    max_q: int  # longest packed sequence, 0 when dense
    max_k: int
    backend: str  # "reference" | "cpu" | "cuda" | "triton"

    @functools.cached_property
    def is_plain(self) -> bool:
        """Without options that are no tensors, but for the scale and causal."""
        return self.softcap is None and self.window == (-1, -1) and self.dropout_p == 0.0

    def on(self, backend: str) -> Problem:
        """The same problem on another backend."""
        if backend == self.backend:
            return self
        same = (self.scale, self.softcap, self.causal, self.window, self.dropout_p, self.max_q, self.max_k)
        return problem_of(*same, backend)


_kept = functools.lru_cache(maxsize=256)(Problem)


def problem_of(*fields: Any) -> Problem:
    """Problem(*fields), the one there was where there was one: in small calls its making can be felt."""
    if torch.compiler.is_compiling():
        return Problem(*fields)
    try:
        return _kept(*fields)
    except TypeError:  # traced numbers have no hash
        return Problem(*fields)


class Options(NamedTuple):
    """What may be given to a call besides its q, k, v, as given: see functional.attention."""

    mask: Tensor | None = None
    bias: Tensor | None = None
    causal: Causal = False
    window: Sequence[int] | None = None
    scale: Number | None = None
    softcap: Number | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout_p: Number = 0.0
    dropout_seed: int | None = None


class Packing(NamedTuple):
    """Where the sequences of a packed call lie, as given: see functional.varlen_attention."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


CanonicalCall = tuple[Problem, Primals, Constants]


def dense(q: Tensor, k: Tensor, v: Tensor, options: Options) -> CanonicalCall:
    """The canonical form of a call on [B, H, N, d] tensors; the backend is the reference until chosen."""
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v)
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k, v: expected [B, Hq, N, d], [B, Hkv, M, d], [B, Hkv, M, dv], got {_shapes(q, k, v)}"
        )
    batch, q_heads, n, d = q.shape
    k_batch, kv_heads, m, k_d = k.shape
    v_batch, v_heads, v_m, _ = v.shape
    if k_batch != batch or k_d != d or v_batch != k_batch or v_heads != kv_heads or v_m != m:
        raise ValueError(
            "q, k, v: expected one batch size, k's last dimension equal to q's, k and v alike in heads and "
            f"length, got {_shapes(q, k, v)}"
        )
    check_head_groups(q_heads, kv_heads)
    return _with_options(Primals(q, k, v, None, None, None), NO_CONSTANTS, options, (batch, q_heads, n, m))


def packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, options: Options) -> CanonicalCall:
    """The canonical form of a call on packed [total, H, d] tensors: transposed views [1, H, total, d]."""
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v)
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3:
        raise ValueError(
            "q, k, v: expected [total_q, Hq, d], [total_k, Hkv, d], [total_k, Hkv, dv], "
            f"got {_shapes(q, k, v)}"
        )
    total_q, q_heads, d = q.shape
    total_k, kv_heads, k_d = k.shape
    if k_d != d or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            "q, k, v: expected k's last dimension equal to q's, and k and v alike in length and heads, "
            f"got {_shapes(q, k, v)}"
        )
    check_head_groups(q_heads, kv_heads)
    max_q = _length("max_seqlen_q", packing.max_seqlen_q)
    max_k = _length("max_seqlen_k", packing.max_seqlen_k)
    cu_q = _cu_seqlens("cu_seqlens_q", packing.cu_seqlens_q, q, total_q, max_q)
    cu_k = _cu_seqlens("cu_seqlens_k", packing.cu_seqlens_k, q, total_k, max_k)
    entries = cu_q.shape[0]
    if cu_k.shape[0] != entries:
        raise ValueError(
            f"cu_seqlens_k: expected as many entries as cu_seqlens_q, {entries}, got {cu_k.shape[0]}"
        )
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    full = (entries - 1, q_heads, max_q, max_k)
    constants = Constants(None, None, cu_q, cu_k)
    return _with_options(Primals(q, k, v, None, None, None), constants, options, full)


def has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# Dynamo of torch 2.10 cannot trace it, and need not: a device has autocast or has not.
has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors as torch's autocast hands them to its own attention: floats but float64 in its dtype."""
    first = tensors[0]
    if internals.no_autocast() or not isinstance(first, Tensor):
        return tensors
    device = first.device.type
    if not (has_autocast(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor)
        and t.is_floating_point()
        and t.dtype != torch.float64
        and t.device.type == device
        else t
        for t in tensors
    )


def check_qkv(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str, str] = QKV) -> None:
    """Refuse what is no three strided tensors of one floating dtype on one device."""
    for name, t in zip(names, (q, k, v), strict=True):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        _check_strided(name, t)
    dtype, device = q.dtype, q.device
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"{names[0]}: expected float64, float32, bfloat16 or float16, got {dtype}")
    if k.dtype != dtype or v.dtype != dtype:
        raise TypeError(f"{', '.join(names)}: expected one dtype, got {dtype}, {k.dtype} and {v.dtype}")
    if k.device != device or v.device != device:
        raise ValueError(f"{', '.join(names)}: expected one device, got {device}, {k.device} and {v.device}")


def _check_strided(name: str, t: Tensor) -> None:
    if t.is_nested:
        raise NotImplementedError(
            f"{name}: expected a strided tensor, got a nested one; of a jagged [B, j, H, d] pass values(), "
            "and offsets() as cu_seqlens, to varlen_attention"
        )
    if t.layout != torch.strided:
        raise NotImplementedError(f"{name}: expected a strided tensor, got layout {t.layout}")


def check_head_groups(q_heads: int, kv_heads: int, names: tuple[str, str] = ("q", "k and v have")) -> None:
    """Refuse query heads that do not split evenly over the key heads."""
    if q_heads != kv_heads and (kv_heads == 0 or q_heads % kv_heads):
        raise ValueError(
            f"{names[0]}: expected as many heads as {names[1]}, {kv_heads}, or a multiple, got {q_heads}"
        )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors)


def _with_options(
    primals: Primals, constants: Constants, options: Options, full: tuple[int, int, int, int]
) -> CanonicalCall:
    """Check the options and add them; `full` is [B, Hq, N, M] as masks see it."""
    mask, bias, causal, window, scale, softcap, slopes, sinks, dropout_p, dropout_seed = options
    q = primals.q
    d = q.shape[-1]
    if causal is True:
        alignment: str | None = "top-left"
    elif causal is False:
        alignment = None
    elif causal in ("top-left", "bottom-right"):
        alignment = causal
    else:
        raise ValueError(f"causal: expected False, True, 'top-left' or 'bottom-right', got {causal!r}")
    sides = (-1, -1) if window is None else _window(window)
    if scale is None:
        scale = 1.0 / math.sqrt(d) if d else 1.0  # without features every score is 0, whatever the scale
    else:
        scale = _real("scale", scale)
        if not -math.inf < scale < math.inf:
            raise ValueError(f"scale: expected a finite number, got {scale}")
    if softcap is not None:
        softcap = _real("softcap", softcap)
        if not 0.0 < softcap < math.inf:
            raise ValueError(f"softcap: expected a positive finite number or None, got {softcap}")
    if type(dropout_p) is not float:
        dropout_p = _real("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability between 0 and 1, got {dropout_p}")
    if dropout_seed is not None:
        dropout_seed = _integer("dropout_seed", dropout_seed, "an int or None")
    if dropout_seed is not None and not -(2**63) <= dropout_seed < 2**63:
        raise ValueError(f"dropout_seed: expected a 64-bit signed integer, got {dropout_seed}")
    if mask is not None:
        _check_option("mask", mask, q, (torch.bool,))
        mask = _broadcastable("mask", mask, full)
    if bias is not None:
        _check_option("bias", bias, q, FLOAT_DTYPES)
        bias = _broadcastable("bias", bias, full)
    if slopes is not None:
        _check_option("alibi_slopes", slopes, q, FLOAT_DTYPES)
        slopes = _per_head("alibi_slopes", slopes, q, full)
    if sinks is not None:
        _check_option("sinks", sinks, q, FLOAT_DTYPES)
        sinks = _per_head("sinks", sinks, q, full)
    max_q, max_k = (0, 0) if constants.cu_q is None else full[2:]
    rng = _rng(full[0], dropout_seed, q.device) if dropout_p > 0.0 else None
    if bias is not None or sinks is not None or slopes is not None:
        primals = Primals(q, primals.k, primals.v, bias, sinks, slopes)
    if mask is not None or rng is not None:
        constants = Constants(mask, rng, constants.cu_q, constants.cu_k)
    return (
        problem_of(scale, softcap, alignment, sides, dropout_p, max_q, max_k, "reference"),
        primals,
        constants,
    )


def _window(window: Sequence[int]) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: expected (left, right) or None, got {window!r}")
    sides = []
    for side in window:
        if type(side) is not int and not _is_integer(side):
            raise TypeError(f"window: expected two integers, got {window!r}")
        if side < -1:
            raise ValueError(f"window: expected sides of at least -1 (unlimited), got {window!r}")
        # no sequence is as long as 2**31: such a side is none, and the kernels' sums of it would overflow
        sides.append(-1 if side >= 2**31 else _plain_integer(side))
    left, right = sides
    return left, right


def _is_integer(value: Any) -> bool:
    """Python's, numpy's and Dynamo's; bools are flags."""
    return isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)


def _plain_integer(value: Any) -> Any:
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def _integer(name: str, value: Any, expected: str = "an int") -> int:
    if not _is_integer(value):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    found: int = _plain_integer(value)
    return found


def _real(name: str, value: Any) -> float:
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt, Real)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Tensor):
        return _number_of(name, value)
    raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def _number_of(name: str, t: Tensor) -> float:
    """The number in a tensor without dimensions, which torch takes for one too."""
    _check_strided(name, t)
    if t.ndim != 0 or t.dtype == torch.bool or t.is_complex():
        raise TypeError(
            f"{name}: expected a number, got a tensor of shape {list(t.shape)} and dtype {t.dtype}"
        )
    if internals.differentiated_or_mapped(t):
        raise NotImplementedError(
            f"{name}: expected a constant number, got a tensor that is differentiated or mapped over; detach "
            "it, or multiply q by a scale"
        )
    return float(t)


def _length(name: str, value: int) -> int:
    value = _integer(name, value)
    if not 0 <= value < 2**31:
        raise ValueError(f"{name}: expected a length from 0 to 2**31 - 1, got {value}")
    return value


def _cu_seqlens(name: str, cu: Tensor, q: Tensor, total: int, longest: int) -> Tensor:
    if not isinstance(cu, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(cu).__name__}")
    _check_strided(name, cu)
    if cu.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {cu.dtype}")
    if cu.device != q.device:
        raise ValueError(f"{name}: expected a tensor on q's device, {q.device}, got one on {cu.device}")
    if cu.ndim != 1 or cu.shape[0] == 0:
        raise ValueError(f"{name}: expected shape [sequences + 1], got {list(cu.shape)}")
    if total >= 2**31:
        raise ValueError(f"{name}: expected fewer than 2**31 packed rows, got {total}")
    if readable(cu) and not _checked.holds(cu, total, longest):
        ends = cu.tolist()
        if ends[0] != 0 or ends[-1] != total:
            raise ValueError(f"{name}: expected to go from 0 to {total}, got {ends[0]} to {ends[-1]}")
        lengths = [end - start for start, end in pairwise(ends)]
        if lengths and min(lengths) < 0:
            raise ValueError(f"{name}: expected no decreasing entry, got {min(lengths)} rows in a sequence")
        if lengths and max(lengths) > longest:
            raise ValueError(
                f"{name.replace('cu_seqlens', 'max_seqlen')}: expected at least the longest sequence's "
                f"{max(lengths)}, got {longest}"
            )
        _checked.add(cu, total, longest)
    return cu.to(torch.int32).contiguous()


class _Checked:
    """Tensors whose values were found right, until they change: to read them again would wait for the GPU.

    Of tensors on a CPU none is held: reading is quick there, and other libraries change values unseen.
    """

    def __init__(self, devices: tuple[str, ...]) -> None:
        self.devices = devices
        self._found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def holds(self, t: Tensor, *against: int) -> bool:
        return self._counts(t) and (t._version, *against) in self._found.get(t, ())

    def add(self, t: Tensor, *against: int) -> None:
        if self._counts(t):
            others = {found for found in self._found.get(t, ()) if found[0] == t._version}
            self._found[t] = {*others, (t._version, *against)}

    def _counts(self, t: Tensor) -> bool:
        return t.device.type in self.devices and not t.is_inference()  # inference tensors count no changes


_checked = _Checked(("cuda",))


def readable(t: Tensor) -> bool:
    """Whether the values can be read in Python: not of fake, traced, meta and functorch-wrapped tensors.

    Nor while a CUDA graph is captured: reading waits for the device. The call that warmed it up was checked.
    """
    return (
        not torch.compiler.is_compiling()
        and type(t) in (Tensor, torch.nn.Parameter)
        and t.device.type != "meta"
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        and torch._C._len_torch_dispatch_stack() == 0
        and not (t.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _check_option(name: str, t: Tensor, q: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor or None, got {type(t).__name__}")
    _check_strided(name, t)
    if t.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected {names}, got {t.dtype}")
    if t.device != q.device:
        raise ValueError(f"{name}: expected a tensor on q's device, {q.device}, got one on {t.device}")


def _broadcastable(name: str, t: Tensor, full: tuple[int, int, int, int]) -> Tensor:
    """t as [1|B, 1|Hq, 1|N, 1|M], by a view: nothing is expanded."""
    shape = t.shape
    rank = len(shape)
    if rank > 4 or any(size not in (1, target) for size, target in zip(shape, full[4 - rank :], strict=True)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {list(full)}, got {list(shape)}")
    return t if rank == 4 else t.view((1,) * (4 - rank) + tuple(shape))


def _per_head(name: str, t: Tensor, q: Tensor, full: tuple[int, int, int, int]) -> Tensor:
    """t as [1|B, Hq] in the compute dtype."""
    batch, heads = full[:2]
    shape = tuple(t.shape)
    if shape == (heads,):
        t = t.unsqueeze(0)
    elif shape not in ((batch, heads), (1, heads)):
        raise ValueError(f"{name}: expected shape [{heads}] or [{batch}, {heads}], got {list(shape)}")
    return t.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def _rng(batch: int, seed: int | None, device: torch.device) -> Tensor:
    """int64 [B, 2]; a drawn seed stays on the device, so that nothing waits for it."""
    if seed is None:
        seeds = torch.randint(0, 2**63 - 1, (), device=device).expand(batch)
    else:
        seeds = torch.full((batch,), seed, dtype=torch.int64, device=device)
    return torch.stack((seeds, torch.arange(batch, device=device)), 1)
