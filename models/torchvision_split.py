"""Splits a network of torchvision in its traced graph.

A cut is a node that everything behind it depends on alone. The last cut with more than one pixel is the final map; the
last cut of each resolution before it is a stage output. Where the last cut holds tokens, the head reads these, and the
stage outputs are sums of a block and its residual, equally spaced.
"""

import math
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from errors import UserError
from models.preprocessing import INTERPOLATIONS, Preprocessing
from models.split import Split, columns_to_tokens, equally_spaced, no_map, patches_to_map, probe, tokens_to_columns

#: What may follow the final map. Anything else works on features, so the map before it is not the last.
HEAD_LAYERS = (
    (nn.Linear, nn.Identity, nn.Flatten, nn.Dropout, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)
    + (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d)
    + (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.Tanh)
)

#: What can be dropped: the layer that does it, and what it is called.
DROP_LAYERS = {"drop_rate": (nn.Dropout, "dropout"), "drop_path_rate": (StochasticDepth, "stochastic depth")}
#: torchvision's transformers have a class token before the patches.
PREFIX = 1


def list_names() -> list[str]:
    """The classification networks."""
    return torchvision.models.list_models(module=torchvision.models)


def build(architecture: str, num_classes: int, image_size: int | None, drops: Mapping[str, float]) -> nn.Module:
    """A network without trained weights, and without the auxiliary classifiers that change what it returns."""
    network = _build(architecture, num_classes, image_size)
    for name, rate in drops.items():
        _set_drop(network, f"--{name}: torchvision:{architecture}", *DROP_LAYERS[name], rate)
    return network


def _set_drop(network: nn.Module, source: str, kind: type[nn.Module], what: str, rate: float) -> None:
    """Give the layers of one kind this rate; where theirs grows with the depth, up to this one."""
    layers: list[Any] = [layer for layer in network.modules() if isinstance(layer, kind)]
    largest = max((layer.p for layer in layers), default=0.0)
    if not layers:
        raise UserError(f"{source} has no {what}; leave the flag out")
    for layer in layers:
        layer.p = rate * (layer.p / largest) if largest else rate


def _build(architecture: str, num_classes: int, image_size: int | None) -> nn.Module:
    options = {"aux_logits": False, "init_weights": True} if architecture in ("googlenet", "inception_v3") else {}
    options |= {"weights": None, "num_classes": num_classes}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of a classifier without classes
        if image_size:
            try:
                return torchvision.models.get_model(architecture, image_size=image_size, **options)
            except TypeError:  # its weights belong to no image size
                pass
        return torchvision.models.get_model(architecture, **options)


def read_preprocessing(weights: str) -> Preprocessing | None:
    """What torchvision says of weights, by `NAME[@WEIGHTS]`, its first ones by default; None where it has none."""
    architecture, _, wanted = weights.partition("@")
    if architecture not in list_names():
        return None
    members = torchvision.models.get_model_weights(architecture).__members__
    if not members or (wanted and wanted not in members):
        return None
    entry = members[wanted or next(iter(members))]
    transform, mode = entry.transforms(), entry.transforms().interpolation.value
    (size,), (resize,) = transform.crop_size, transform.resize_size
    return Preprocessing(
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        image_size=size,
        test_size=size,
        test_resize=resize,
        interpolation=mode if mode in INTERPOLATIONS else "bilinear",
        categories=tuple(entry.meta["categories"]),
    )


class _Tracer(fx.Tracer):
    """Keeps torch's own layers whole, and the one of torchvision that is random."""

    def is_leaf_module(self, module, qualified_name):
        return isinstance(module, StochasticDepth) or super().is_leaf_module(module, qualified_name)


class _ShapeReader(fx.Interpreter):
    """Notes the shape of every tensor in a run."""

    def __init__(self, network: nn.Module, graph: fx.Graph):
        super().__init__(network, graph=graph)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, node):
        result = super().run_node(node)
        if isinstance(result, Tensor):
            self.shapes[node.name] = tuple(result.shape)
        return result


def split(name: str, network: nn.Module, num_classes: int, image_size: int | None = None) -> Split:
    """Cut the network; raises `UserError` where it has no last feature map or no linear classifier.

    `image_size` decides nothing here: at small ones the last map has one pixel, and could not be found.
    """
    graphs = {mode: _Tracer().trace(network.train(mode)) for mode in (False, True)}
    graph, shapes = graphs[False], {}

    def read_shapes(blank, image):
        reader = _ShapeReader(blank, graph)
        reader.run(image)
        shapes.update(reader.shapes)

    size = probe(name, network, read_shapes, (getattr(network, "image_size", None),))
    stages, is_tokens = _find_stages(name, graph, shapes)
    *_, final = stages
    classifier = _check_head(name, network, graph, final, num_classes)
    features, heads = {}, {}
    for mode, traced in graphs.items():
        features[mode] = _compile(network, _cut_features(traced, [node.name for node in stages]))
        heads[mode] = _compile(network, _cut_head(traced, final.name, classifier))
    layouts = [_layout(shapes[node.name]) for node in stages]

    def show(module: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
        maps, last = features[module.training](module, images)
        maps = [layout(each) for layout, each in zip(layouts, maps, strict=True)]
        return maps, tokens_to_columns(last) if is_tokens else last

    def head(module: nn.Module, activated: Tensor) -> tuple[Tensor, Tensor]:
        return heads[module.training](module, columns_to_tokens(activated) if is_tokens else activated)

    _, *shape = layouts[-1](torch.empty(shapes[final.name], device="meta")).shape
    classifier = classifier if num_classes else None
    return Split(show, head, classifier, _describe(final), tuple(shape), size, PREFIX if is_tokens else None)


def _find_stages(name: str, graph: fx.Graph, shapes: dict[str, tuple[int, ...]]) -> tuple[list[fx.Node], bool]:
    """The stage outputs, the final map last, and whether they are tokens."""
    cuts = [
        node
        for node in _find_cuts(graph)
        if node.op != "placeholder" and _layout(shapes.get(node.name, ())) is not None
    ]
    if not cuts:
        raise no_map(name, "it has no feature map that all of it passes through")
    *_, last = cuts
    if len(shapes[last.name]) == 3:
        sums = [node for node in cuts if node.target is operator.add and shapes[node.name] == shapes[last.name]]
        blocks = sums[1:]  # the first adds the positions; two follow in each block
        return [*(blocks[position] for position in equally_spaced(len(blocks))[:-1]), last], True
    by_resolution: dict[int, fx.Node] = {}
    for node in (cut for cut in cuts if len(shapes[cut.name]) == 4):
        side = shapes[node.name][2]  # a side in both layouts of a map
        # Windows of an attention, as many as they have channels, look like a map: of a resolution that was left before.
        if side <= min(by_resolution, default=side):
            by_resolution[side] = node
    return list(by_resolution.values()), False


def _find_cuts(graph: fx.Graph) -> list[fx.Node]:
    order = {node: position for position, node in enumerate(graph.nodes)}
    cuts, needed_until = [], -1  # the last position that reads a node before the current one
    for node, position in order.items():
        if needed_until <= position:
            cuts.append(node)
        if node.op != "get_attr":
            needed_until = max([needed_until, *(order[user] for user in node.users)])
    return cuts


def _layout(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor] | None:
    """How a tensor of this shape becomes a map (B, C, H, W); None where it is no map of more than one pixel.

    The blank image is square, so of four sides the two that are equal are height and width.
    """
    if len(shape) == 3 and shape[1] == PREFIX + math.isqrt(shape[1] - PREFIX) ** 2 > PREFIX:
        return lambda tokens: patches_to_map(tokens_to_columns(tokens), PREFIX)
    if len(shape) == 4 and shape[2] == shape[3] > 1:
        return lambda channels_first: channels_first
    if len(shape) == 4 and shape[1] == shape[2] > 1:
        return lambda channels_last: channels_last.movedim(3, 1)
    return None


def _check_head(name: str, network: nn.Module, graph: fx.Graph, final: fx.Node, num_classes: int) -> str:
    """The classifier's name, if only pooling, normalisation and linear layers follow the final map."""
    nodes = list(graph.nodes)
    layers = {node.target: network.get_submodule(node.target) for node in nodes if node.op == "call_module"}
    behind = {node.target for node in nodes[nodes.index(final) + 1 :] if node.op == "call_module"}
    linear = [target for target in layers if target in behind and isinstance(layers[target], nn.Linear)]
    if not linear or layers[linear[-1]].out_features != num_classes:
        raise no_map(name, "its last layer is no linear classifier behind the last feature map")
    others = [target for target in layers if target in behind and not isinstance(layers[target], HEAD_LAYERS)]
    if others:
        raise no_map(name, f"{others[0]} ({type(layers[others[0]]).__name__}) follows its last feature map")
    return linear[-1]


def _cut_features(graph: fx.Graph, stages: list[str]) -> fx.Graph:
    part, copies = fx.Graph(), {}
    for node in graph.nodes:
        copies[node.name] = part.node_copy(node, lambda other: copies[other.name])
        if node.name == stages[-1]:
            break
    part.output(([copies[stage] for stage in stages], copies[stages[-1]]))
    return part


def _cut_head(graph: fx.Graph, final: str, classifier: str) -> fx.Graph:
    part, copies, pooled = fx.Graph(), {}, None
    nodes = list(graph.nodes)
    start = next(position for position, node in enumerate(nodes) if node.name == final)
    attributes = [node for node in nodes[:start] if node.op == "get_attr"]
    copies[final] = part.placeholder("activated")
    for node in [*attributes, *nodes[start + 1 :]]:
        if node.op == "output":
            part.output((pooled, copies[node.args[0].name]))
            break
        copies[node.name] = part.node_copy(node, lambda other: copies[other.name])
        if node.op == "call_module" and node.target == classifier:
            pooled = copies[node.args[0].name]
    return part


def _compile(network: nn.Module, graph: fx.Graph):
    """The graph as a function of (a network with the same names of layers, its input)."""
    return type(fx.GraphModule(network, graph)).forward


def _describe(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    inside = stack[-1][0] if stack and isinstance(stack[-1], tuple) else ""
    if node.op == "call_module":
        return f"the output of {node.target}"
    return f"the output of {node.name}" + (f" in {inside}" if inside else "")
