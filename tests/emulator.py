"""A CUDA device that is not there, for tests on a machine without one.

    with emulated_cuda() as device: ...

A tensor «on cuda» is a `CudaTensor`, a wrapper around a CPU tensor. Autograd, the rules of views
and autocast, by CUDA's list of casts, are those of torch. Beneath, a dispatch mode sees each
operation: it refuses what CUDA refuses (tensors of two devices), puts garbage into what `empty`
returns, counts kernels, and counts what waits for the device by the line that does.

A graph records operations. Capturing computes nothing. A replay runs what was recorded on what the
same memory holds by then, and nothing else: what Python held is lost, what a graph made is garbage
afterwards, and memory that was freed since is noticed.

Not emulated: streams, the allocator, cuDNN's and fused attention's numbers, speed. Inside C++ the
tensors are on «maia», a device that no build has: torch casts for it as for cuda, and looks for no
driver.
"""
import contextlib
import ctypes
import functools
import pathlib
import sys
from collections import Counter

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

ROOT, CPU = pathlib.Path(__file__).parents[1], torch.device("cpu")
CUDA, INSIDE = torch.device("cuda", 0), torch.device("maia", 0)
GARBAGE = 0xFE                       # each byte: -1.7e38, or a negative index
LOOKS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select",
         "multinomial", "bincount", "_unique2", "unique_dim", "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
WHOLE = {"rms_norm", "scaled_dot_product_attention"}     # one kernel where no gradient is needed
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Refused(RuntimeError):
    """CUDA would fail here, or compute with what is no longer there."""


def is_cuda(device):
    return torch.device(device).type in (CUDA.type, INSIDE.type)


class CudaTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda = CUDA, True

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype,
            device=INSIDE)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise Refused(f"{function} on the emulated device, which is no longer there")

    def __tensor_flatten__(self):    # so that Module.to keeps the parameters that it moves
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts, *_):
        return CudaTensor(parts["inner"])

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.inner = new.inner

    def __deepcopy__(self, memo):
        memo[id(self)] = new = self.detach().clone().requires_grad_(self.requires_grad)
        new._is_param = getattr(self, "_is_param", False)
        return new

    def tolist(self):
        return self.cpu().tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def __repr__(self):
        return f"cuda {self.inner}"


class Reference:
    """A tensor as a graph knows it: memory, which it holds if it made it, and how to read it."""
    def __init__(self, tensor, own):
        storage = tensor.untyped_storage()
        self.memory, self.weak = storage if own else None, StorageWeakRef(storage)
        self.layout = tensor.storage_offset(), tensor.shape, tensor.stride()
        self.dtype = tensor.dtype

    def tensor(self):
        if self.memory is None and self.weak.expired():
            raise Refused("a replay over memory that was freed since its capture")
        memory = self.memory or torch.UntypedStorage._new_with_weak_ptr(self.weak.cdata)
        return torch.empty(0, dtype=self.dtype).set_(memory, *self.layout)


def spoil(storage):
    if storage.nbytes():
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(GARBAGE)


class Graph:
    """torch.cuda.CUDAGraph."""
    def __init__(self):
        self.steps, self.own, self.kernels, self.replays = [], {}, Counter(), 0

    def pool(self):
        """Of its own memory, or whose it is given."""
        return self.given_pool or id(self)

    def reference(self, x):
        if isinstance(x, CudaTensor):
            return Reference(x, x.untyped_storage()._cdata in self.own)
        return x.clone() if torch.is_tensor(x) else x            # of the CPU: as it is now

    def record(self, function, args, kwargs, made):
        """made: the tensors whose memory is new, in the order in which they come out."""
        references = tree_map(self.reference, (args, kwargs))
        self.own.update((x.untyped_storage()._cdata, x.untyped_storage()) for x in made)
        self.steps.append((function, *references, [Reference(x, own=True) for x in made]))

    def spoil(self):
        for storage in self.own.values():
            spoil(storage)

    @torch.inference_mode()
    @_disable_current_modes()
    def replay(self):
        if not self.steps:
            raise Refused("a replay of what was never captured")
        self.replays += 1
        for function, args, kwargs, made in self.steps:
            args, kwargs = tree_map(lambda x: x.tensor() if isinstance(x, Reference) else x,
                                    (args, kwargs))
            out = function(*args, **kwargs)
            for memory, new in zip(made, tree_leaves(out)):
                memory.tensor().copy_(new)
        self.spoil()


class Device(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.kernels, self.waits, self.capturing = Counter(), Counter(), None
        self.graphs = []             # all that were captured

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, wanted = kwargs or {}, (kwargs or {}).get("device")
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        ours = [x for x in tensors if isinstance(x, CudaTensor)]
        if not ours and (wanted is None or not is_cuda(wanted)):
            return function(*args, **kwargs)
        name, composite, view = traits(function)
        if composite:                # shown by inference mode alone: `to`, and not its copy
            with self:
                return function.decompose(*args, **kwargs)
        if name == "_fused_sdp_choice":
            return 0                 # the one in small steps: the others are made for a device
        self.check(function, name, args, tensors)
        if self.waits_for(name, args, wanted):
            self.waits[f"{name} {site()}"] += 1
            if self.capturing:
                raise Refused(f"{function} waits for the device, within a capture")
        if wanted is not None:
            kwargs = kwargs | dict(device=CPU)
        run = self.capture_one if self.capturing and not view else on_inner
        out = run(function, args, kwargs)
        if wanted is not None and not is_cuda(wanted):
            return out
        known = {id(inner_of(x)): x for x in tensors}            # what is changed in place
        inference = ours[0].is_inference() if view else torch.is_inference_mode_enabled()
        with torch.inference_mode(inference):        # a view is of the kind of what it shows
            out = tree_map(lambda x: known[id(x)] if id(x) in known else CudaTensor(x)
                           if torch.is_tensor(x) else x, out)
        if name in EMPTY:
            spoil(out.untyped_storage())
        if not view and name not in EMPTY and name != "_unsafe_view":
            self.count(name)
        return out

    def count(self, name):
        for kernels in [self.kernels, *([self.capturing.kernels] if self.capturing else [])]:
            kernels[name] += 1

    def capture_one(self, function, args, kwargs):
        """Computes nothing; what would come out has its shape, and garbage in it."""
        shapes, new = {}, []

        def shape(x):
            if torch.is_tensor(x):
                made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
                shapes[made] = inner_of(x)
                return made
            return torch.device("meta") if x == CPU else x

        def filled(x):
            if not torch.is_tensor(x) or x in shapes:
                return shapes.get(x, x)              # changed in place
            new.append(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype))
            spoil(new[-1].untyped_storage())
            return new[-1]

        args_, kwargs_ = tree_map(shape, (args, kwargs))
        out = tree_map(filled, function(*args_, **kwargs_))
        self.capturing.record(function, args, kwargs, new)
        return out

    def check(self, function, name, args, tensors):
        """A number of the CPU may stand beside tensors of CUDA, and an index of the CPU."""
        others = [x for x in tensors if not isinstance(x, CudaTensor)]
        if name in INDEXING and isinstance(args[0], CudaTensor):
            others = [x for x in args[2:3] if not isinstance(x, CudaTensor)]
        if name not in ("_to_copy", "copy_") and any(
                x.ndim or len(others) == len(tensors) for x in others):
            shapes = [(*x.shape, x.device.type) for x in tensors]
            raise Refused(f"{function}: tensors of two devices: {shapes}")

    def waits_for(self, name, args, wanted):
        first = isinstance(args[0], CudaTensor) if args else True
        if name == "_to_copy":
            return wanted is not None and is_cuda(wanted) != first
        if name == "copy_":
            return first != isinstance(args[1], CudaTensor)
        if name in INDEXING:
            return any(x.dtype in (torch.bool, torch.uint8) or not isinstance(x, CudaTensor)
                       for x in args[1] if x is not None)
        return name in LOOKS or name == "repeat_interleave"      # by a tensor

    @contextlib.contextmanager
    def capture(self, graph, pool=None):
        """torch.cuda.graph."""
        self.capturing, graph.given_pool = graph, pool
        try:
            yield
        finally:
            self.capturing = None
        self.graphs.append(graph)


class Autocast(torch.autocast):
    """What cuda is told, the device inside is told as well."""
    def __init__(self, device_type, *args, **kwargs):
        self.cuda = device_type == CUDA.type
        super().__init__(INSIDE.type if self.cuda else device_type, *args, **kwargs)

    def tell(self, enabled, dtype):
        if self.cuda:
            torch.set_autocast_enabled(CUDA.type, enabled)
            torch.set_autocast_dtype(CUDA.type, dtype)

    def __enter__(self):
        self.before = torch.is_autocast_enabled(CUDA.type), torch.get_autocast_dtype(CUDA.type)
        self.tell(self._enabled, self.fast_dtype)
        return super().__enter__()

    def __exit__(self, *error):
        self.tell(*self.before)
        return super().__exit__(*error)


def inner_of(x):
    return x.inner if isinstance(x, CudaTensor) else x


@functools.cache
def traits(function):
    """-> its name; whether it is made of others, and is not one kernel of CUDA; whether it is a
    view, and no kernel."""
    name = function.overloadpacket.__name__
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(function.name(),
                                                               "CompositeImplicitAutograd")
    view = any(spec.alias_info and not spec.alias_info.is_write
               for spec in function._schema.returns)
    return name, composite and name not in WHOLE, view


def on_inner(function, args, kwargs):
    args, kwargs = tree_map(inner_of, (args, kwargs))
    return function(*args, **kwargs)


def site():
    """The innermost line of the project."""
    frame = sys._getframe(2)
    while frame and (ROOT not in (path := pathlib.Path(frame.f_code.co_filename)).parents
                     or path == pathlib.Path(__file__)):
        frame = frame.f_back
    return f"{path.name}:{frame.f_lineno}" if frame else "?"


def moved(x):
    """A device that somebody named, as torch's C++ is told it."""
    is_device = isinstance(x, (str, torch.device)) and is_cuda(x)
    return INSIDE if is_device else x


@contextlib.contextmanager
def device_guards():
    """A guard that does nothing for the device inside, as its slot is empty in torch's table."""
    library = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * 15).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    maia, meta = 8, 14               # c10/core/DeviceType.h
    assert table[meta] and not table[maia], "torch keeps its devices elsewhere"
    table[maia] = table[meta]
    try:
        yield
    finally:
        table[maia] = None


@contextlib.contextmanager
def emulated_cuda():
    """Inside, torch has one CUDA device -> it. After it, all is as it was, and what was on the
    device is lost."""
    device, to, patch = Device(), torch.Tensor.to, pytest.MonkeyPatch()
    patch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: to(
        x, *map(moved, args), **{name: moved(value) for name, value in kwargs.items()}))
    for home in (torch, torch.amp, torch.amp.autocast_mode):
        patch.setattr(home, "autocast", Autocast)
    for name, value in dict(CUDAGraph=Graph, graph=device.capture, _lazy_init=lambda: None,
                            is_available=lambda: True, empty_cache=lambda: None).items():
        patch.setattr(torch.cuda, name, value)
    try:
        with device_guards(), device, torch.autograd.set_multithreading_enabled(False):
            yield device
    finally:
        patch.undo()
