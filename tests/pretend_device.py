"""A pretend accelerator: tensors that live on the CPU but answer `cuda:0`, with real numbers, and the same refusals as CUDA.

    python pretend_device.py [--kind cuda|mps] SCRIPT WORDS...      runs SCRIPT as __main__ on the pretend device
    with pretend("cuda"): ...                                  the same in a test

Every storage carries a tag (which device it pretends to be on). A TorchFunctionMode answers `.device`, `.is_cuda`, `.to`, `.cpu`, `.cuda`,
`.numpy` and the factories' `device=`; a TorchDispatchMode sees every ATen call (also those of the backward pass), refuses tensors of two
devices as CUDA does ("Expected all tensors to be on the same device"), and tags what comes out. Kinds: `cuda`; `mps`, which also refuses
float64 as Apple's GPUs do and has no pinned memory, no streams. Counted: copies from host
to device, those of them for which CUDA would wait (from memory that is not pinned, or not told otherwise), reads back (synchronisations).
"""

from __future__ import annotations

import contextlib
import runpy
import sys
import threading
import traceback
from collections import Counter

import torch
import torch._dynamo  # before anything is patched: it looks at torch as it is
import torch.utils.checkpoint
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
WILD = torch.device("hpu")  # of what C++ itself makes (zeros in a backward formula): fits every device
_python = threading.local()
aten, prims = torch.ops.aten, torch.ops.prims
COUNT: Counter[str] = Counter()
WHERE: Counter[str] = Counter()
_tags: dict[int, tuple[StorageWeakRef, torch.device]] = {}
_pinned: dict[int, StorageWeakRef] = {}
_kind = "cuda"
_lock = threading.RLock()


def _norm(device) -> torch.device:
    device = torch.device(device) if not isinstance(device, torch.device) else device
    return torch.device(device.type, device.index or 0) if device.type != "cpu" else CPU


def tag_of(t: torch.Tensor) -> torch.device:
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        try:
            s = torch.Tensor.untyped_storage(t)
        except Exception:
            return CPU
        if s._cdata in _tags:
            ref, device = _tags[s._cdata]
            if not ref.expired() and ref.cdata == s._cdata:
                return device
            _tags.pop(s._cdata, None)
        return CPU


def set_tag(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        s = torch.Tensor.untyped_storage(t)
        if s.device.type != "cpu":
            return t  # meta
        if device.type == "cpu":
            _tags.pop(s._cdata, None)
        else:
            if _kind == "mps" and t.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
            _tags[s._cdata] = (StorageWeakRef(s), device)
    return t


def is_pinned(t: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        s = torch.Tensor.untyped_storage(t)
        ref = _pinned.get(s._cdata)
        return ref is not None and not ref.expired() and ref.cdata == s._cdata


def set_pinned(t: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        s = torch.Tensor.untyped_storage(t)
        _pinned[s._cdata] = StorageWeakRef(s)
    return t


# Of these the 0-dimensional CPU tensor is refused too, as CUDA's kernels do
STRICT = {"cat", "stack", "_fused_adamw_", "_fused_adam_", "_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_"}
FREE = {"copy_", "_foreach_copy_", "set_", "is_same_size", "resize_as_"}  # across devices
INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}  # indices may be on the CPU


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        wanted = None
        if isinstance(kwargs.get("device"), torch.device) and kwargs["device"].type != "meta":
            kwargs["device"] = CPU  # what was said in Python is done in Functions; C++ takes all for the CPU's
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        flat, _ = tree_flatten((args, kwargs))
        tensors = [t for t in flat if isinstance(t, torch.Tensor)]
        if any(_meta(t) for t in tensors):
            return func(*args, **kwargs)
        found = None
        if tensors:
            pool = tensors
            if name in INDEX:
                indices = {id(t) for t in tree_flatten(args[1])[0] if isinstance(t, torch.Tensor)}
                for t in pool:
                    if id(t) in indices and tag_of(t).type != "cpu" and tag_of(args[0]).type == "cpu":
                        raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor (cpu) in {func}")
                    if id(t) in indices and tag_of(t).type == "cpu" and tag_of(args[0]).type != "cpu":
                        COUNT["index of the host copied"] += 1
                        _where("index of the host copied")
                pool = [t for t in pool if id(t) not in indices]
            devices = {}
            for t in pool:
                if (device := tag_of(t)) != WILD:
                    devices.setdefault(device, []).append(t)
            if name in FREE:
                found = None
                if isinstance(args[0], torch.Tensor) and tag_of(args[0]) == WILD and len(args) > 1 and isinstance(args[1], torch.Tensor):
                    set_tag(args[0], tag_of(args[1]))
                if name == "copy_":
                    a, b = tag_of(args[0]), tag_of(args[1])
                    if a != b and WILD not in (a, b):
                        _moved(b, a, args[1], bool((args[2:3] or [kwargs.get("non_blocking")])[0]))
            elif len(devices) > 1:
                host = devices.get(CPU, [])
                others = [d for d in devices if d != CPU]
                if len(others) > 1 or name in STRICT or any(t.dim() for t in host):
                    raise RuntimeError(
                        f"Expected all tensors to be on the same device, but found at least two devices, "
                        f"{others[0]} and cpu! (pretended) in {func}; shapes {[(tuple(t.shape), str(tag_of(t))) for t in tensors][:6]}"
                    )
                found = others[0]
            else:
                found = next(iter(devices), None)
        if name in ("_local_scalar_dense", "item", "equal", "nonzero", "masked_select") and found is not None and found.type != "cpu":
            COUNT["read back"] += 1
            _where(f"read back {name}")
        if _kind == "mps" and (wanted or found or CPU).type != "cpu" and kwargs.get("dtype") == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        out = func(*args, **kwargs)
        place = found or (WILD if tensors or not getattr(_python, "factory", False) else CPU)
        if name in FREE:
            return out
        inputs = {id(t) for t in tensors}
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor) and id(t) not in inputs and not _meta(t) and not _aliases(t, tensors):
                set_tag(t, place)
        return out


def _meta(t) -> bool:
    with torch._C.DisableTorchFunction():
        return torch.Tensor.is_meta.__get__(t)


def _aliases(t, tensors) -> bool:
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        try:
            own = torch.Tensor.untyped_storage(t)._cdata
            return any(torch.Tensor.untyped_storage(x)._cdata == own for x in tensors)
        except Exception:
            return False


def _where(what: str) -> None:
    for frame in reversed(traceback.extract_stack()):
        if "/ldm/" in frame.filename and "site-packages" not in frame.filename and "fake_cuda" not in frame.filename:
            WHERE[f"{what}: {frame.filename.split('/ldm/')[-1]}:{frame.lineno} {frame.line}"] += 1
            return


def _moved(source: torch.device, target: torch.device, t, non_blocking: bool) -> None:
    what = "host to device" if target.type != "cpu" else "device to host"
    if what == "host to device" and not (non_blocking and is_pinned(t)):
        COUNT["waited for"] += 1
        _where("waited for")
    COUNT[what] += 1
    COUNT[f"{what}, bytes"] += t.numel() * t.element_size()
    _where(what)


class Cross(torch.autograd.Function):
    """A copy to another device, and its gradient's way back."""

    @staticmethod
    def forward(ctx, t, device, dtype, non_blocking):
        ctx.source, ctx.dtype = tag_of(t), t.dtype
        _moved(ctx.source, device, t, non_blocking)
        with torch._C._DisableTorchDispatch():
            out = t.to(dtype=dtype or t.dtype, copy=True)
        return set_tag(out, device)

    @staticmethod
    def backward(ctx, g):
        with torch._C._DisableTorchDispatch():
            out = g.to(dtype=ctx.dtype, copy=True)
        return set_tag(out, ctx.source), None, None, None


def move(t, device, dtype=None, non_blocking=False, copy=False, memory_format=None):
    device = _norm(device)
    if tag_of(t) == device:
        return None
    if _kind == "mps" and device.type == "mps" and (dtype or t.dtype) == torch.float64:
        raise TypeError(
            "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use float32 instead."
        )
    out = Cross.apply(t, device, dtype, non_blocking)
    return out if memory_format is None else out.contiguous(memory_format=memory_format)


T = torch.Tensor
FACTORIES = {torch.tensor, torch.as_tensor, torch.asarray}


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        t = args[0] if args else None
        if func == T.device.__get__:
            real = func(*args)
            return real if real.type != "cpu" else CPU if (tag := tag_of(t)) == WILD else tag
        if func == T.is_cuda.__get__:
            return tag_of(t).type == "cuda"
        if func == T.is_cpu.__get__:
            return tag_of(t).type == "cpu" and func(*args)
        if func == T.is_mps.__get__:
            return tag_of(t).type == "mps"
        if func in (T.get_device,):
            return -1 if tag_of(t).type == "cpu" else 0
        if func is T.to:
            return self._to(func, args, kwargs)
        if func in (T.cpu, T.cuda):
            target = CPU if func is T.cpu else _norm(kwargs.get("device", args[1] if len(args) > 1 else _kind))
            moved = move(t, target)
            return t if moved is None else moved
        if func in (T.numpy, T.__array__) and tag_of(t).type != "cpu":
            raise TypeError(
                f"can't convert {tag_of(t)} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        if func is T.tolist and tag_of(t).type != "cpu":
            COUNT["read back"] += 1
            _where("read back tolist")
        if func is T.pin_memory:
            if tag_of(t).type != "cpu":
                raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
            return t if is_pinned(t) else set_pinned(t.clone())
        if func is T.is_pinned:
            return is_pinned(t)
        if func in FACTORIES:
            device = kwargs.pop("device", None) if (kwargs := dict(kwargs)) else None
            made = self._call(func, args, kwargs)
            if device is None or _norm(device).type == "meta":
                return made if device is None else made.to("meta")
            moved = move(made, device)
            return made if moved is None else moved
        if kwargs.get("pin_memory"):
            made = self._call(func, args, {**kwargs, "pin_memory": False, "device": CPU})
            return set_pinned(made)
        device = kwargs.get("device")
        if device is not None and not isinstance(device, (str, int, torch.device)):
            return func(*args, **kwargs)
        if device is not None and torch.device(device).type != "meta":
            # C++ must not see it: CUDA's kernels are not there
            made = self._call(func, args, {**kwargs, "device": CPU})
            return tree_map(lambda x: set_tag(x, _norm(device)) if isinstance(x, torch.Tensor) else x, made)
        return self._call(func, args, kwargs)

    @staticmethod
    def _call(func, args, kwargs):
        before = getattr(_python, "factory", False)
        _python.factory = not any(isinstance(a, torch.Tensor) for a in args)
        try:
            return func(*args, **kwargs)
        finally:
            _python.factory = before

    @staticmethod
    def _to(func, args, kwargs):
        t, rest = args[0], list(args[1:])
        kwargs = dict(kwargs)
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        non_blocking, copy = kwargs.pop("non_blocking", False), kwargs.pop("copy", False)
        layout = kwargs.pop("memory_format", None)
        for word in ("other",):
            if word in kwargs:
                rest.insert(0, kwargs.pop(word))
        for value in rest:
            if isinstance(value, torch.Tensor):
                device, dtype = tag_of(value) if not _meta(value) else torch.device("meta"), value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, bool):
                non_blocking = value
            elif value is not None:
                device = torch.device(value) if not isinstance(value, int) else torch.device(_kind, value)
        if device is None or torch.device(device).type == "meta" or _meta(t):
            plain = {"dtype": dtype, "copy": copy, "memory_format": layout, "device": device}
            return func(t, **{k: v for k, v in plain.items() if v is not None})
        moved = move(t, device, dtype, non_blocking, copy, layout)
        if moved is not None:
            return moved
        return func(t, dtype=dtype or t.dtype, copy=copy, **({} if layout is None else {"memory_format": layout}))


class _Event:
    def __init__(self, *a, **k): ...
    def record(self, *a): ...
    def wait(self, *a): ...
    def synchronize(self): ...
    def query(self):
        return True

    def elapsed_time(self, other):
        return 1.0


class _Stream:
    def __init__(self, *a, **k): ...
    def record_event(self, *a):
        return _Event()

    def wait_event(self, *a): ...
    def wait_stream(self, *a): ...
    def is_capturing(self):
        return False

    def query(self):
        return True

    def synchronize(self): ...


class _Properties:
    name, total_memory, major, minor, multi_processor_count = "NVIDIA H200", 139 * 2**30, 9, 0, 132


_autocast_init = torch.autocast.__init__


def _autocast(self, device_type, dtype=None, enabled=True, cache_enabled=None):
    if device_type != "cpu" and dtype is None and enabled:
        dtype = torch.float16
    _autocast_init(self, "cpu" if device_type != "meta" else device_type, dtype, enabled, cache_enabled)


@contextlib.contextmanager
def pretend(kind: str = "cuda"):
    """Within it there is one accelerator."""
    global _kind
    _kind = kind
    import unittest.mock as mock

    patches = []

    def put(place, name, value):
        patches.append(mock.patch.object(place, name, value, create=True))

    put(torch.autocast, "__init__", _autocast)
    put(torch.accelerator, "is_available", lambda: True)
    put(torch.accelerator, "current_accelerator", lambda *a, **k: torch.device(kind))
    put(torch.accelerator, "device_count", lambda: 1)
    put(torch.accelerator, "current_stream", lambda *a: _Stream())
    put(torch.accelerator, "current_device_index", lambda *a: 0)
    put(torch.accelerator, "synchronize", lambda *a: None)
    if kind == "cuda":
        c = torch.cuda
        for name, value in {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda *a: None,
            "synchronize": lambda *a: None,
            "empty_cache": lambda: None,
            "get_device_name": lambda *a: "NVIDIA H200",
            "get_device_properties": lambda *a: _Properties(),
            "get_device_capability": lambda *a: (9, 0),
            "is_bf16_supported": lambda *a, **k: True,
            "mem_get_info": lambda *a: (139 * 2**30,) * 2,
            "max_memory_allocated": lambda *a: 0,
            "memory_allocated": lambda *a: 0,
            "reset_peak_memory_stats": lambda *a: None,
            "Stream": _Stream,
            "Event": _Event,
            "current_stream": lambda *a: _Stream(),
            "stream": lambda *a: contextlib.nullcontext(),
            "manual_seed_all": lambda *a: None,
            "manual_seed": lambda *a: None,
            "get_rng_state": lambda *a: torch.zeros(16, dtype=torch.uint8),
            "get_rng_state_all": lambda *a: [],
            "is_current_stream_capturing": lambda: False,
            "device": lambda *a: contextlib.nullcontext(),
        }.items():
            put(c, name, value)
    else:
        put(torch.backends.mps, "is_available", lambda: True)
        put(torch.backends.mps, "is_built", lambda: True)
        put(torch.mps, "manual_seed", lambda *a: None)
        put(torch.mps, "empty_cache", lambda: None)
        put(torch.mps, "current_allocated_memory", lambda: 0)

    import torch.nn.utils.clip_grad as clipping
    import torch.optim.optimizer as optimizer
    import torch.utils._foreach_utils as foreach

    grouped = foreach._group_tensors_by_device_and_dtype

    def grouping(lists, with_indices=False):  # C++ groups by its own devices, which are all the CPU
        found = {}
        for (device, dtype), value in grouped(lists, with_indices).items():
            first = next(t for t in value[0][0] if t is not None)
            found[tag_of(first) if device is not None else None, dtype] = value
        return found

    for place in (foreach, clipping, optimizer):
        put(place, "_group_tensors_by_device_and_dtype", grouping)

    engine = torch.autograd._engine_run_backward

    def backward(*args, **kwargs):  # what is recomputed in it asks for devices, too; torch takes the mode away while it handles `backward`
        with contextlib.nullcontext() if torch._C._is_torch_function_mode_enabled() else Functions():
            return engine(*args, **kwargs)

    put(torch.autograd, "_engine_run_backward", backward)
    checkpoint = torch.utils.checkpoint
    seen = {"default": lambda t: {"shape": t.shape, "dtype": t.dtype}}  # not the device: what torch itself keeps says "cpu"
    put(checkpoint, "_allowed_determinism_checks_to_fns", checkpoint._allowed_determinism_checks_to_fns | seen)
    inner = threading.Thread.run

    def run(self):
        with Functions(), Dispatch():
            inner(self)

    put(threading.Thread, "run", run)
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(Functions())
        stack.enter_context(Dispatch())
        yield


if __name__ == "__main__":
    words = sys.argv[1:]
    kind = "cuda"
    if words[0] == "--kind":
        kind, words = words[1], words[2:]
    sys.argv = words
    code = 0
    try:
        with pretend(kind):
            if words[0] == "-m":
                sys.argv = words[1:]
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.path.insert(0, ".")
                runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    print("counted:", dict(COUNT), file=sys.stderr)
    for line, count in WHERE.most_common(45):
        print(f"  {count:6d}  {line}", file=sys.stderr)
    sys.exit(code)
