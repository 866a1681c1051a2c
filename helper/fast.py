"""How the same mathematics is computed faster: precision, memory layout, folded teacher, fused optimizer, compiler."""

import copy
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from errors import UserError, first_line
from models.backbone import Backbone, Output, random_images
from models.folding import fold_batch_norms
from models.fusing import fuse_activations

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Whether torch.compile is used, and in which mode: reduce-overhead replays CUDA graphs, auto is the default mode in
#: runs of LONG_RUN steps or more, and goes without where the compiler fails.
COMPILE = ("off", "auto", "default", "reduce-overhead")
#: Steps of training that take much longer than the compiler: it takes one to three minutes, less the next time.
LONG_RUN = 5000
#: Parameters of glibc's allocator, as mallopt(3) numbers them.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
#: Compilations of one function, at most: runs side by side share the functions of their networks and methods.
MOST_COMPILATIONS = 256


@runtime_checkable
class _Thrifty(Protocol):
    """A module that can compute the same with few operations."""

    few_operations: bool


class Float32Convolution(nn.Conv2d):
    """A convolution that is computed in float32 whatever its input is; its output is as its input."""

    @classmethod
    def like(cls, layer: nn.Conv2d) -> "Float32Convolution":
        """The same convolution, with the same parameters."""
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        sizes: dict[str, Any] = {name: getattr(layer, name) for name in names}
        same = cls(layer.in_channels, layer.out_channels, bias=layer.bias is not None, device="meta", **sizes)
        same.weight, same.bias = layer.weight, layer.bias
        return same.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class _Converted(torch.autograd.Function):
    """Tensors in another dtype, and their gradients back in their own, each by one operation for all of them."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.set_materialize_grads(False)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return _convert(tensors, [dtype] * len(tensors))

    @staticmethod
    def backward(ctx, *gradients):
        there = [
            (gradient, dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True) if gradient is not None
        ]
        converted = iter(_convert(*zip(*there, strict=True)) if there else ())
        return None, *(None if gradient is None else next(converted) for gradient in gradients)


def _convert(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    converted = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(converted, list(tensors))  # pyright: ignore[reportPrivateImportUsage]
    return tuple(converted)


class _Pass(nn.Module):
    """A stage's `respond` as a module over its method, so that it can be run with other weights."""

    def __init__(self, method: nn.Module, respond: Callable):
        super().__init__()
        self.method, self.respond = method, respond

    def forward(self, images: Tensor, teacher: Output | None) -> Any:
        return self.respond(images, teacher)


class Fast(NamedTuple):
    """The choices of a run. Losses, BatchNorm statistics, weights and optimizer are float32 in every one."""

    precision: str = "float32"  # of the convolutions and matrix products in both networks
    channels_last: bool = False  # memory layout of images, maps and convolution weights
    fold_teacher: bool = False  # the teacher's BatchNorms in its convolutions
    fused_optimizer: bool = False  # one operation for all parameters, and few where many small ones would do
    compile: str = "off"  # one of COMPILE, for both networks' passes and the losses

    @classmethod
    def of(cls, config: Any) -> "Fast":
        return cls(**{part: getattr(config, part) for part in cls._fields})

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """The context in which both networks run."""
        return torch.autocast(device.type, PRECISIONS[self.precision], enabled=self.precision != "float32")

    def prepare_teacher(self, network: Backbone, image_size: int) -> Backbone:
        """A network that is never trained, as this run computes it; `network` itself where nothing is chosen."""
        network = fold_batch_norms(network, image_size) if self.fold_teacher else network
        if self.precision != "float32":
            # Autocast would convert the same weights again in every step. BatchNorms that are left stay float32.
            network = copy.deepcopy(network)
            for layer in network.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    layer.to(PRECISIONS[self.precision])
        network = self.lay_out(network)
        if not self.fold_teacher or self.compile != "off":  # a compiler fuses by itself
            return network
        device = next(network.parameters()).device
        images = self.lay_out(random_images(image_size).to(device))
        return fuse_activations(network, images, lambda: self.autocast(device))

    def lay_out(self, value: Any) -> Any:
        """The same network or images (B, C, H, W) in the chosen memory layout."""
        if not self.channels_last:
            return value
        if isinstance(value, nn.Module) and any(one.dim() == 5 for one in value.parameters()):
            return value  # a network with three-dimensional convolutions, for which torch has another layout
        return value.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def prepare_student(self, distiller: nn.Module, device: torch.device) -> nn.Module:
        """The same module as this run trains it."""
        if self.precision != "float32" and device.type == "cpu":
            # oneDNN's backward pass of depthwise convolutions is slower in bfloat16 than in float32, but with matrix
            # units only where they have a stride.
            any_stride = not has_matrix_units(device)
            for name, layer in list(distiller.named_modules()):
                if type(layer) is not nn.Conv2d or not layer.groups == layer.in_channels > 1:
                    continue  # it is not depthwise
                if any_stride or layer.stride != (1, 1):
                    distiller.set_submodule(name, Float32Convolution.like(layer))
        for module in distiller.modules():
            if isinstance(module, _Thrifty):
                module.few_operations = self.fused_optimizer and self.compile == "off"
        return self.lay_out(distiller)

    def passing(self, method: nn.Module, respond: Callable) -> Callable:
        """A stage's `respond` with what each layer needs besides its own work done for all layers at once.

        Autocast converts each weight by itself, and each BatchNorm counts its batches. A compiler sees to it itself.
        """
        if self.compile != "off":
            return respond
        if self.precision != "float32":
            respond = self._with_converted_weights(method, respond)
        if self.channels_last:
            respond = _with_laid_out_gradient(respond)
        return _counting_once(method, respond) if self.fused_optimizer else respond

    def _with_converted_weights(self, method: nn.Module, respond: Callable) -> Callable:
        # Other kinds of layers may do more with their weights, and adapters are also used outside autocast.
        names = [
            f"method.{name}.{own}"
            for name, layer in method.named_modules()
            if name.startswith("student") and type(layer) in (nn.Conv2d, nn.Linear)
            for own, _ in layer.named_parameters()
        ]
        whole, dtype = _Pass(method, respond), PRECISIONS[self.precision]

        def convert_and_respond(images: Tensor, teacher: Output | None) -> Any:
            converted = _Converted.apply(dtype, *map(whole.get_parameter, names))
            return functional_call(whole, dict(zip(names, converted, strict=True)), (images, teacher))

        return convert_and_respond if names else respond

    def compiled(self, function: Callable, outlives: bool = False) -> Callable:
        """A network's forward pass as this run computes it on batches of one size; itself where nothing is compiled.

        What the pass gives can be read until the next pass of any network; if it `outlives` that, also later.
        """
        if self.compile == "off":
            return function
        _set_up_compiler()
        if self.compile == "auto":
            return _compiled_if_possible(function)
        run = torch.compile(function, dynamic=False, mode=self.compile)
        if self.compile != "reduce-overhead":
            return run

        def replay(*arguments):
            torch.compiler.cudagraph_mark_step_begin()  # a graph writes to the same memory each time
            output = run(*arguments)
            return _copy(output) if outlives else output

        return replay

    def captured(self, update: Callable) -> Callable:
        """What follows the passes of a step and changes weights, as this run computes it: without numbers on the host,
        a CUDA graph can hold it behind theirs. Without such graphs it is itself, with torch's fused kernels."""
        if self.compile != "reduce-overhead":
            return update
        return torch.compile(update, fullgraph=True, dynamic=False, mode=self.compile)

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Say that tensors stay where they are, so that a CUDA graph may change them in place."""
        for tensor in tensors if self.compile == "reduce-overhead" else ():
            torch._dynamo.mark_static_address(tensor)

    @contextmanager
    def naming_compiler(self) -> Iterator[None]:
        """Turn a failure of the compiler, in a forward or backward pass, into a `UserError`."""
        if self.compile == "off":
            yield
            return
        try:
            yield
        except torch._dynamo.exc.TorchDynamoException as error:  # pyright: ignore[reportAttributeAccessIssue]
            raise UserError(
                f"--compile {self.compile}: {_cause(error)}; it needs a working compiler (on a CPU one of C++); "
                "--compile off goes without, also with --resume"
            ) from None


@functools.cache
def _set_up_compiler() -> None:
    from torch._inductor.cpu_vec_isa import VecISA

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILATIONS)
    VecISA.check_build = cast(Any, _kept(VecISA.check_build))


def _kept(check: Callable[[Any, str], bool]) -> Callable[[Any, str], bool]:
    """Torch's trial of what its compiler makes for this CPU, once for a compiler: in every run it would start six
    programs that import torch, 15 seconds long."""
    from torch._inductor.codecache import write
    from torch._inductor.cpu_vec_isa import _get_isa_dry_compile_fingerprint as compiler_and

    def check_once(instructions: Any, code: str) -> bool:
        passed = Path(write(code, "cpp", extra=compiler_and(instructions._arch_flags))[1]).with_suffix(".passed")
        if not passed.exists() and check(instructions, code):
            passed.touch()
        return passed.exists()

    return check_once


def _compiled_if_possible(function: Callable) -> Callable:
    # A compiler fails before anything is computed, so the same call can be made without.
    run: Callable | None = torch.compile(function, dynamic=False)

    def compute(*arguments):
        nonlocal run
        if run is not None:
            try:
                return run(*arguments)
            except torch._dynamo.exc.TorchDynamoException as error:  # pyright: ignore[reportAttributeAccessIssue]
                run = None
                print(f"--compile auto: {_cause(error)}; nothing is compiled", file=sys.stderr)
        return function(*arguments)

    return compute


def _cause(error: Exception) -> str:
    cause = getattr(error, "inner_exception", error)
    return f"{type(cause).__name__} {first_line(cause)}"


def _with_laid_out_gradient(respond: Callable) -> Callable:
    # The gradient of an average pooling is not in the layout of its input, and a BatchNorm or ReLU in front of the
    # pooling then takes many times as long.
    def respond_with_hook(images: Tensor, teacher: Output | None) -> Any:
        output = respond(images, teacher)
        pooled_map = getattr(output, "activated", None)  # a method may have outputs of its own
        layout = torch.channels_last
        if pooled_map is not None and pooled_map.requires_grad and pooled_map.is_contiguous(memory_format=layout):
            pooled_map.register_hook(_laid_out)
        return output

    return respond_with_hook


def _laid_out(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


def _counting_once(method: nn.Module, respond: Callable) -> Callable:
    # With a momentum nothing reads the number of batches; with kinds from elsewhere that is not known.
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    layers = (layer for layer in method.modules() if isinstance(layer, plain) and type(layer) in plain)
    norms = [layer for layer in layers if layer.momentum is not None]

    def respond_and_count(images: Tensor, teacher: Output | None) -> Any:
        training = [layer for layer in norms if layer.training and layer.num_batches_tracked is not None]
        counters = cast(list[Tensor], [layer.num_batches_tracked for layer in training])  # those without are left out
        for layer in training:
            layer.num_batches_tracked = None
        try:
            return respond(images, teacher)
        finally:
            for layer, counter in zip(training, counters, strict=True):
                layer.num_batches_tracked = counter
            if counters:
                torch._foreach_add_(counters, 1)  # pyright: ignore[reportPrivateImportUsage]

    return respond_and_count


def _copy(output: Output) -> Output:
    return Output(
        [feature_map.clone() for feature_map in output.maps],
        output.final.clone(),
        output.activated.clone(),
        output.pooled.clone(),
        output.logits.clone(),
        tuple(map(_copy, output.others)),
    )


def keep_freed_memory(device: torch.device) -> None:
    """Have this process keep the memory that a step frees for the next step, where a CPU computes.

    The C library gives large pieces back to the system, which fills them with zeros before they are used again: a tenth
    of a step. Only glibc can be asked to keep them; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and device.type == "cpu":
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise `UserError` where a device has no units for a precision."""
    if precision == "float16" and device.type == "cpu":
        raise UserError(
            "--precision float16: a CPU emulates it, a hundred times slower; take float32 or bfloat16, or --device cuda"
        )


def computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products have units of their own here, and are not emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bfloat16_units()


def has_matrix_units(device: torch.device) -> bool:
    """Whether products of matrices have units of their own: AMX on a CPU, tensor cores on a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 0)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def _has_bfloat16_units() -> bool:
    # oneDNN accepts bfloat16 on every AVX-512 machine, but emulates it without these.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
