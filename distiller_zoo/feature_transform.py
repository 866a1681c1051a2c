"""NORM's feature transform (Liu et al., ICLR 2023): two linear 1x1 layers around the student's last map.

    y = BN1(x W1^T)     W1: (N*Ct) x C, the expanded student representation: N segments of the teacher's Ct channels
    z = BN2(y W2^T)     W2: C x (N*Ct)
    out = z + x         with the residual (the "default" transform), z without (the "plain" one)

A transformer's tokens are rows like pixels: all of them are transformed, class tokens too, and both BatchNorms see all
of them; only the patches, which `to_map` finds, are matched to the teacher's map.

There is nothing non-linear between the layers, so output, running statistics and matching loss follow from the second
moments of x and of the teacher's map alone (`_collapsed`; derived in docs/norm.md), at a cost that hardly grows with N.

With `--sync_bn` both BatchNorms are synchronised, and so are these moments: the loss is that of all processes' pixels.

`Matching` is the same in training, forward and backward pass written out in few operations: eager operations on small
maps take as long as they are many.

Of several teachers each has N segments of its own, behind those of the teachers before it, and a loss of its own; the
losses are summed with the teachers' shares.

Shapes: B batch, C student channels, Ct teacher channels, P = B*H*W pixels (B*T tokens); `rows` are pixels x channels.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distiller_zoo.maps import match_size, takes_maximum
from models.synchronised import is_synchronised, total, update_statistics

FORMS = ("auto", "direct", "collapsed")


def norm_loss(expanded: Tensor, target: Tensor) -> Tensor:
    """NORM's matching loss: the sum over the N segments of the mean squared distance to the teacher's map.

    expanded (B, N*Ct, H, W), target (B, Ct, H, W) -> scalar; N * mean((y - [t, ..., t])^2) in the paper's notation.
    """
    segments = expanded.unflatten(1, (-1, target.shape[1]))
    return (segments - target.unsqueeze(1)).square().mean(dim=(0, 2, 3, 4)).sum()


def _to_rows(feature_map: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, H, W) -> (P, C)."""
    return feature_map.permute(0, 2, 3, 1).flatten(0, 2).to(dtype)


def _to_map(rows: Tensor, like: Tensor) -> Tensor:
    """(P, C) -> (B, C, H, W), with the batch and image size of `like`."""
    return rows.unflatten(0, (like.shape[0], *like.shape[2:])).permute(0, 3, 1, 2)


def _layer(layer: nn.Sequential, columns: Tensor) -> Tensor:
    """A 1x1 convolution and its BatchNorm, (C, P) -> (M, P), as one matrix product: faster where maps are small."""
    conv, bn = layer
    # As rows, (P, M), BatchNorm would add in an order that loses a digit of float32.
    return bn((conv.weight.flatten(1) @ columns)[None, :, :, None])[0, :, :, 0]


def _own(values: Tensor) -> Tensor:
    """The sum over this process alone; `total` takes its place where BatchNorms are synchronised."""
    return values


def _same(positions: Tensor) -> Tensor:
    """The `to_map` of what is a map."""
    return positions


def _moments(rows: Tensor, over_all: Callable[[Tensor], Tensor]) -> tuple[int | Tensor, Tensor, Tensor]:
    """Rows (P, C) -> (their number, mean (C,), rows without the mean); number and mean are those of all processes."""
    pixels = len(rows) if over_all is _own else over_all(rows.new_tensor(len(rows)))
    mean = over_all(rows.sum(0)) / pixels
    return pixels, mean, rows - mean


def _projected_squares(weight: Tensor, centred: Tensor) -> Tensor:
    """Sum of squares over the pixels of each row of `weight` (M, C) applied to `centred` (P, C) -> (M,)."""
    pixels, channels = centred.shape
    if pixels <= channels:  # (M, P) is no larger than `weight`, and spares the rounding of a squared factor
        return (weight @ centred.T).square().sum(1)
    scatter = centred.T @ centred
    return ((weight @ scatter) * weight).sum(1).clamp_min(0)  # rounding can fall below zero


def _statistics(bn: nn.Module, mean: Tensor, variance: Tensor, pixels: int | Tensor) -> tuple[Tensor, Tensor]:
    """The mean and variance that `bn` normalises with, given those of the batch; in training the running ones move."""
    if not bn.training:
        return bn.running_mean.to(mean.dtype), bn.running_var.to(mean.dtype)
    if isinstance(pixels, int) and pixels == 1:
        raise ValueError("a feature transform in training needs more than one pixel: raise the batch or the image size")
    update_statistics(bn, mean, variance, pixels)
    return mean, variance


def multiply_adds(pixels: int, channels: int, teacher_channels: int, n: int, moments: bool = True) -> dict[str, int]:
    """Multiply-adds of a forward pass in both forms (docs/norm.md).

    Without `moments`, as in prediction, the collapsed form only multiplies the two layers and applies the product.
    """
    expanded_channels = n * teacher_channels
    collapsed = expanded_channels * channels**2 + pixels * channels**2  # W2 A, and its application
    if moments and pixels > channels:
        collapsed += pixels * channels**2 + expanded_channels * channels**2  # S, and W1 S
    elif moments:
        collapsed += pixels * channels * expanded_channels  # W1 on every pixel
    if moments:
        collapsed += pixels * channels * teacher_channels  # Q
    return {"direct": 2 * pixels * channels * expanded_channels, "collapsed": collapsed}


class Matching(torch.autograd.Function):
    """The collapsed form up to the second BatchNorm, in training: (z, loss, mean (C,), variance (M,) of the first one).

    x (B, C, H, W), target (B, Ct, H, W), w1 (M, C), weight and bias (M,) of BN1, its eps, w2 (C, M) -> z (P, C); M is
    N*Ct. The gradients are those of docs/norm.md. They need that what reads z does not see its mean, as a BatchNorm in
    training does not: columns of dz sum to 0. Mean and variance have no gradient.
    """

    @staticmethod
    def forward(ctx, x, target, w1, weight, bias, eps, w2):
        ctx.set_materialize_grads(False)  # mean and variance would get zeros
        channels, teacher_channels = x.shape[1], target.shape[1]
        rows = [each.permute(0, 2, 3, 1).flatten(0, 2) for each in (x, target)]
        pixels = len(rows[0])
        both = w1.new_empty(pixels, channels + teacher_channels)
        torch.cat(rows, 1, out=both)
        means = both.mean(0)  # torch's `var_mean` takes several times as long on a CPU
        both -= means
        centred, mean_t = both[:, :channels], means[channels:]
        # (S; Q): the student's scatter, and its products with the teacher, both over P
        moments = torch.addmm(w1.new_empty(()), both.T, centred, beta=0, alpha=1 / pixels)
        scatter, cross = moments[:channels], moments[channels:]

        projected = w1 @ scatter
        variance = (projected * w1).sum(1).clamp_min_(0)  # rounding can fall below zero
        root = (variance + eps).rsqrt_()
        scale = weight * root
        a = scale[:, None] * w1
        k = w2 @ a
        z = torch.addmm(w2 @ bias, centred, k.T)

        scaled, segments = scale * variance, a.unflatten(0, (-1, teacher_channels)).sum(0)
        away = mean_t - bias.unflatten(0, (-1, teacher_channels))
        n, share = len(away), 1 / teacher_channels
        spread = both[:, channels:].square().sum().view(1, 1)  # of the teacher's map, times P
        # a dot product and a sum as one operation
        loss = torch.addmm(spread, scale[None], scaled[:, None], beta=n / pixels)
        loss = torch.addmm(loss, segments.view(1, -1), cross.reshape(-1, 1), alpha=-2)
        loss = torch.addmm(loss, away.view(1, -1), away.view(-1, 1), beta=share, alpha=share)
        ctx.save_for_backward(both, w1, w2, a, k, root, scale, scaled, projected, cross, segments, away)
        ctx.like = x.shape, x.dtype
        mean = means[:channels]
        ctx.mark_non_differentiable(mean, variance)
        return z, loss.view(()), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, dz, dloss, *_):
        both, w1, w2, a, k, root, scale, scaled, projected, cross, segments, away = ctx.saved_tensors
        (batch, channels, *size), dtype = ctx.like
        teacher_channels, pixels = cross.shape[0], len(both)
        dz = both.new_zeros(pixels, channels) if dz is None else dz
        factor = (both.new_zeros(()) if dloss is None else dloss) * (-2 / teacher_channels)
        dk = dz.T @ both[:, :channels]
        dw2, da = dk @ a.T, w2.T @ dk
        da.unflatten(0, away.shape).addcmul_(cross, factor)
        dweight = torch.addcmul((da * w1).sum(1), scaled, factor, value=-1) * root
        less = scale * torch.addcmul(scale * factor, dweight, root)  # -2 d(loss)/d(variance)
        dw1 = (scale[:, None] * da).addcmul_(projected, less[:, None], value=-1)
        dmoments = w1.new_empty(both.shape[1], channels)
        torch.addmm(dmoments[0], (less[:, None] * w1).T, w1, beta=0, alpha=-1, out=dmoments[:channels])
        torch.mul(segments, factor, out=dmoments[channels:])
        dx = torch.addmm(dz @ k, both, dmoments, alpha=1 / pixels)
        dx = dx.to(dtype).view(batch, *size, channels).permute(0, 3, 1, 2)
        return dx, None, dw1, dweight, (factor * away).flatten(), None, dw2


class FeatureTransform(nn.Module):
    """The transform as one module: `forward(x, target)` -> (out, loss).

    teacher_channels: Ct, or of several teachers theirs, which have N * (Ct1 + Ct2 + ...) channels; `shares` are what
    the loss of each counts, 1 by default.
    form: "direct" runs the two layers one after the other; "collapsed" works on second moments and never holds anything
    of size P x (N*Ct); "auto" takes the one with fewer multiply-adds. Both give the same numbers. Statistics, output
    and loss are computed in float32 or better, outside autocast.
    """

    def __init__(
        self,
        channels: int,
        teacher_channels: int | Sequence[int],
        n: int,
        residual: bool = True,
        form: str = "auto",
        shares: Sequence[float] | None = None,
    ):
        super().__init__()
        if n < 1:
            raise ValueError(f"N must be at least 1, not {n}")
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form}")
        widths = [teacher_channels] if isinstance(teacher_channels, int) else list(teacher_channels)
        self.teacher_channels, self.n, self.residual, self.form = sum(widths), n, residual, form
        self._shares = [1.0] * len(widths) if shares is None else list(shares)
        ends = itertools.accumulate(n * width for width in widths)
        self._parts = [slice(end - n * width, end) for end, width in zip(ends, widths, strict=True)]  # of each teacher
        self.few_operations = False  # `Matching` where it applies: the same numbers up to rounding
        expanded_channels = n * self.teacher_channels
        self.expand = nn.Sequential(
            nn.Conv2d(channels, expanded_channels, 1, bias=False), nn.BatchNorm2d(expanded_channels)
        )
        self.contract = nn.Sequential(nn.Conv2d(expanded_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(
        self, x: Tensor, target: Tensor | Sequence[Tensor] | None = None, to_map: Callable[[Tensor], Tensor] = _same
    ) -> tuple[Tensor, Tensor | None]:
        """x (B, C, H, W), target (B, Ct, H, W), or one of each teacher, or None -> (out as x, matching loss or None).

        `to_map` takes what has x's positions, (B, channels, H, W) or tokens (B, channels, T, 1), to the map that is
        matched. To a smaller target the expanded map is pooled, by maximum where the sizes divide (in the direct form).
        """
        targets = [] if target is None else [target] if isinstance(target, Tensor) else list(target)
        needs_moments = len(targets) > 0 or self.expand[1].training or self.contract[1].training
        with torch.autocast(x.device.type, enabled=False):
            # A maximum is in no second moment; an average is linear.
            pools = any(takes_maximum(to_map(x).shape[2:], each.shape[2:]) for each in targets)
            if pools or self._chosen_form(x, needs_moments) == "direct":
                out, loss = self._direct(x, targets, to_map)
            elif self.few_operations and len(targets) == 1 and self._fits_matching(x, targets[0], to_map):
                out, loss = self._matched(x, targets[0])
            elif needs_moments:
                out, loss = self._collapsed(x, targets, to_map)
            else:
                out, loss = self._apply_affine(x), None
        return out.to(x.dtype), loss

    def _fits_matching(self, x: Tensor, target: Tensor, to_map: Callable) -> bool:
        """Whether both BatchNorms see the batch of this process, and its pixels are those that are matched."""
        (conv, bn1), (_, bn2) = self.expand, self.contract
        trains = bn1.training and bn2.training and not is_synchronised(bn1)
        many, wide = x.numel() > x.shape[1] ** 2, conv.weight.dtype in (torch.float32, torch.float64)
        return trains and many and wide and to_map(x) is x and x.shape[2:] == target.shape[2:]

    def _matched(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """`_collapsed` in training, by `Matching`."""
        (conv1, bn1), (conv2, bn2) = self.expand, self.contract
        w1, w2 = conv1.weight.flatten(1), conv2.weight.flatten(1)
        z, loss, mean, variance = Matching.apply(x, target, w1, bn1.weight, bn1.bias, bn1.eps, w2)
        update_statistics(bn1, w1.detach() @ mean, variance, len(z))
        out = bn2(_to_map(z, x)).to(x.dtype)
        return (out + x if self.residual else out), loss

    def _chosen_form(self, x: Tensor, needs_moments: bool) -> str:
        if self.form != "auto":
            return self.form
        if is_synchronised(self.expand[1]):
            return "collapsed"  # processes with more and with fewer images have to exchange the same sums
        pixels, channels = x.numel() // x.shape[1], x.shape[1]
        costs = multiply_adds(pixels, channels, self.teacher_channels, self.n, needs_moments)
        return min(costs, key=costs.get)

    def _total(self, losses: Iterable[Tensor]) -> Tensor | None:
        """The teachers' losses, summed with their shares; None of no teacher."""
        weighted = [loss if share == 1 else share * loss for share, loss in zip(self._shares, losses, strict=False)]
        return functools.reduce(operator.add, weighted) if weighted else None

    def _direct(self, x: Tensor, targets: Sequence[Tensor], to_map: Callable) -> tuple[Tensor, Tensor | None]:
        dtype = self.expand[0].weight.dtype
        columns = x.to(dtype).transpose(0, 1).flatten(1)
        expanded = _layer(self.expand, columns)
        out = _layer(self.contract, expanded)
        out, expanded = (each.unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1) for each in (out, expanded))
        if self.residual:
            out = out + x
        parts = zip(targets, self._parts, strict=False)
        matched = ((match_size(to_map(expanded[:, part]), *each.shape[2:]), each.to(dtype)) for each, part in parts)
        return out, self._total(norm_loss(*pair) for pair in matched)

    def _collapsed(self, x: Tensor, targets: Sequence[Tensor], to_map: Callable) -> tuple[Tensor, Tensor | None]:
        """The second-moment form of docs/norm.md; everything is centred before it is multiplied."""
        dtype = torch.promote_types(self.expand[0].weight.dtype, torch.float32)
        (conv1, bn1), (conv2, bn2) = self.expand, self.contract
        over_all = total if is_synchronised(bn1) else _own
        pixels, mean, centred = _moments(_to_rows(x, dtype), over_all)
        w1, w2 = conv1.weight.flatten(1).to(dtype), conv2.weight.flatten(1).to(dtype)

        mean1, variance1 = w1 @ mean, over_all(_projected_squares(w1, centred)) / pixels
        used_mean, used_variance = _statistics(bn1, mean1, variance1, pixels)
        scale1 = bn1.weight * torch.rsqrt(used_variance + bn1.eps)
        a = scale1[:, None] * w1  # y = centred A^T + mean_y
        mean_y = bn1.bias + scale1 * (mean1 - used_mean)
        z = centred @ (w2 @ a).T + w2 @ mean_y
        out = bn2(_to_map(z, x).to(bn2.weight.dtype))
        if self.residual:
            out = out + x.to(out.dtype)
        losses = []
        for target, part in zip(targets, self._parts, strict=False):
            matched, moments = match_size(to_map(x), *target.shape[2:]), (pixels, mean, centred)
            own_mean, own_variance = mean_y[part], variance1[part]
            if matched is not x:  # the moments of the pixels that are matched
                moments = _moments(_to_rows(matched, dtype), over_all)
                own_mean = own_mean + a[part] @ (moments[1] - mean)
                own_variance = over_all(_projected_squares(w1[part], moments[2])) / moments[0]
            spread = (scale1[part].square() * own_variance).sum()
            losses.append(self._collapsed_loss(a[part], spread, own_mean, moments, _to_rows(target, dtype), over_all))
        return out, self._total(losses)

    def _collapsed_loss(
        self,
        a: Tensor,
        variance_y: Tensor,
        mean_y: Tensor,
        moments: tuple[int | Tensor, Tensor, Tensor],
        target: Tensor,
        over_all: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """`norm_loss` of y = centred A^T + mean_y, whose variances add up to `variance_y`: its centred part plus the
        part of the means."""
        pixels, _, centred = moments
        target_mean = over_all(target.sum(0)) / pixels
        target_centred = target - target_mean
        cross = target_centred.T @ centred  # (Ct, C)
        segments = a.unflatten(0, (self.n, -1))
        sums = self.n * target_centred.square().sum() - 2 * (segments.sum(0) * cross).sum()
        centred_part = variance_y + over_all(sums) / pixels
        mean_part = (mean_y.unflatten(0, (self.n, -1)) - target_mean).square().sum()
        return (centred_part + mean_part) / target.shape[1]

    def _apply_affine(self, x: Tensor) -> Tensor:
        weight, bias = self._affine(torch.promote_types(self.expand[0].weight.dtype, torch.float32))
        return _to_map(_to_rows(x, weight.dtype) @ weight.T + bias, x)

    def _affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weight, bias = None, None
        for conv, bn in (self.expand, self.contract):
            scale = bn.weight.to(dtype) * torch.rsqrt(bn.running_var.to(dtype) + bn.eps)
            shift = bn.bias.to(dtype) - scale * bn.running_mean.to(dtype)
            layer = scale[:, None] * conv.weight.to(dtype).flatten(1)
            weight = layer if weight is None else layer @ weight
            bias = shift if bias is None else layer @ bias + shift
        if self.residual:
            weight = weight + torch.eye(len(weight), dtype=dtype, device=weight.device)
        return weight, bias

    @torch.no_grad()
    def as_affine(self) -> tuple[Tensor, Tensor]:
        """The transform in eval mode as one affine map of a pixel, in float64: (K (C, C), k (C)) with out = K x + k."""
        return self._affine(torch.float64)
