"""How the same mathematics is computed faster: precision, memory layout, folded teacher, fused optimizer, compiler."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from errors import UserError
from models.backbone import Backbone, Output
from models.folding import fold_batch_norms

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Modes of torch.compile; the last one replays CUDA graphs.
COMPILE = ("off", "default", "reduce-overhead")
#: Compilations of one function, at most: runs side by side share the functions of their networks and methods.
MOST_COMPILATIONS = 256


class Float32Convolution(nn.Conv2d):
    """A convolution that autocast leaves in float32."""

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
            return super().forward(x.to(self.weight.dtype))


class Fast(NamedTuple):
    """The choices of a run. Losses, BatchNorm statistics, weights and optimizer are float32 in every one."""

    precision: str = "float32"  # of the convolutions and matrix products in both networks
    channels_last: bool = False  # memory layout of images, maps and convolution weights
    fold_teacher: bool = False  # the teacher's BatchNorms in its convolutions
    fused_optimizer: bool = False  # one kernel for all parameters
    compile: str = "off"  # a mode of torch.compile, for the forward passes of both networks

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
        return self.lay_out(network)

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
            # oneDNN's backward pass of depthwise convolutions is slower in bfloat16 than in float32.
            for name, layer in list(distiller.named_modules()):
                if type(layer) is nn.Conv2d and layer.groups == layer.in_channels > 1:
                    distiller.set_submodule(name, Float32Convolution.like(layer))
        return self.lay_out(distiller)

    def compiled(self, function: Callable, outlives: bool = False) -> Callable:
        """A network's forward pass as this run computes it on batches of one size; itself where nothing is compiled.

        What the pass gives can be read until the next pass of any network; if it `outlives` that, also later.
        """
        if self.compile == "off":
            return function
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILATIONS)
        run = torch.compile(function, dynamic=False, mode=self.compile)
        if self.compile != "reduce-overhead":
            return run

        def replay(*arguments):
            torch.compiler.cudagraph_mark_step_begin()  # a graph writes to the same memory each time
            output = run(*arguments)
            return _copy(output) if outlives else output

        return replay

    @contextmanager
    def naming_compiler(self) -> Iterator[None]:
        """Turn a failure of the compiler, in a forward or backward pass, into a `UserError`."""
        if self.compile == "off":
            yield
            return
        try:
            yield
        except torch._dynamo.exc.TorchDynamoException as error:  # pyright: ignore[reportAttributeAccessIssue]
            cause = getattr(error, "inner_exception", error)
            reason = next(iter(str(cause).strip().splitlines()), "")[:200]
            raise UserError(
                f"--compile {self.compile}: {type(cause).__name__} {reason}; it needs a working compiler (on a "
                "CPU one of C++); --compile off goes without, also with --resume"
            ) from None


def _copy(output: Output) -> Output:
    maps, *others = output
    return Output([feature_map.clone() for feature_map in maps], *(other.clone() for other in others))


def computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products have units of their own here, and are not emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bfloat16_units()


def _has_bfloat16_units() -> bool:
    # oneDNN accepts bfloat16 on every AVX-512 machine, but emulates it without these.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
