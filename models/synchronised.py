"""BatchNorm over the batch of all processes (torch.distributed), on any device.

torch's synchronised BatchNorm is for accelerators; on a CPU its mathematics is written out here, with sums over all
processes that gradients flow through.
"""

import torch
from torch import Tensor, distributed, nn

from errors import UserError


def count_processes() -> int:
    """How many processes train together; 1 without torchrun."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def total(values: Tensor) -> Tensor:
    """The sum over all processes of a tensor of one shape; its gradient is the sum of theirs."""
    if count_processes() == 1:
        return values
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(values)


def average(values: Tensor) -> Tensor:
    """The mean over all processes, without gradients."""
    if count_processes() == 1:
        return values
    values = values.detach().clone()
    distributed.all_reduce(values)
    return values / count_processes()


def is_synchronised(bn: nn.Module) -> bool:
    """Whether a BatchNorm in training takes its statistics over all processes."""
    return bn.training and isinstance(bn, (nn.SyncBatchNorm, SyncBatchNormOnCPU)) and count_processes() > 1


def total_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, ...) -> mean (C,), biased variance (C,) and number of values per channel, over all processes."""
    others = [dimension for dimension in range(x.dim()) if dimension != 1]
    number = x.new_full((1,), x.numel() / x.shape[1])
    *sums, number = total(torch.cat([x.sum(others), number])).split([x.shape[1], 1])
    mean = sums[0] / number
    variance = total((x - _per_channel(mean, x)).square().sum(others)) / number
    return mean, variance, number.detach()


def normalise(x: Tensor, bn: nn.Module, moments: tuple[Tensor, Tensor]) -> Tensor:
    """(x - mean) / sqrt(variance + eps) with the affine layer of `bn`, for x (B, C, ...)."""
    mean, variance = (_per_channel(values, x) for values in moments)
    normalised = (x - mean) * torch.rsqrt(variance + bn.eps)
    return normalised * _per_channel(bn.weight, x) + _per_channel(bn.bias, x)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))


class SyncBatchNormOnCPU(nn.BatchNorm2d):
    """What `torch.nn.SyncBatchNorm` computes, for (B, C, ...) on any device."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not is_synchronised(self):
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean, variance, number = total_moments(x)
        update_statistics(self, mean, variance, number)
        return normalise(x, self, (mean, variance)).to(input.dtype)


class _Activated:
    """Does behind its BatchNorm what timm's `BatchNormAct2d` does."""

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class SyncBatchNormAct(_Activated, nn.SyncBatchNorm):
    """torch's synchronised BatchNorm with an activation inside."""


class SyncBatchNormActOnCPU(_Activated, SyncBatchNormOnCPU):
    """Ours with an activation inside."""


@torch.no_grad()
def update_statistics(bn: nn.Module, mean: Tensor, variance: Tensor, number: Tensor | int) -> None:
    """Move the running statistics (C,) towards a batch's mean and biased variance (C,) over `number` values each."""
    unbiased = variance * (number / (number - 1))
    running = [bn.running_mean, bn.running_var]
    torch._foreach_lerp_(running, [mean.to(running[0].dtype), unbiased.to(running[1].dtype)], bn.momentum)
    if bn.num_batches_tracked is not None:  # the fast path counts those of all BatchNorms in one operation
        bn.num_batches_tracked += 1


def synchronise(module: nn.Module) -> None:
    """Replace all other BatchNorms by synchronised ones with the same parameters and buffers.

    Raises `UserError` for a kind of BatchNorm that does what is not known here.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, _synchronised(child))
        else:
            synchronise(child)


def _synchronised(bn: nn.Module) -> nn.Module:
    on_cpu = bn.weight.device.type == "cpu"
    activated = isinstance(getattr(bn, "act", None), nn.Module) and isinstance(getattr(bn, "drop", None), nn.Module)
    if activated:
        kind = SyncBatchNormActOnCPU if on_cpu else SyncBatchNormAct
    elif type(bn) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        kind = SyncBatchNormOnCPU if on_cpu else nn.SyncBatchNorm
    else:
        raise UserError(f"--sync_bn: {type(bn).__name__} cannot be synchronised; leave the flag out")
    new = kind(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats)
    new.weight, new.bias = bn.weight, bn.bias
    if activated:
        new.drop, new.act = bn.drop, bn.act
    for name, buffer in bn.named_buffers():
        setattr(new, name, buffer)
    return new.train(bn.training)
