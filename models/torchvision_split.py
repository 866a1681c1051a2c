"""Splits a network of torchvision in its traced graph.

A cut is a node that everything behind it depends on alone. The last cut with more than one pixel is the final map; the
last cut of each resolution before it is a stage output.
"""

import torchvision
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from models.split import Split, no_map, probe

#: What may stand behind the final map. Anything else works on features, so the map before it is not the last.
HEAD_LAYERS = (
    (nn.Linear, nn.Identity, nn.Flatten, nn.Dropout, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)
    + (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d)
    + (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.Tanh)
)


def list_names() -> list[str]:
    """The classification networks."""
    return torchvision.models.list_models(module=torchvision.models)


def build(architecture: str, num_classes: int) -> nn.Module:
    """A network without trained weights, and without the auxiliary classifiers that change what it returns."""
    plain = {"aux_logits": False, "init_weights": True} if architecture in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(architecture, weights=None, num_classes=num_classes, **plain)


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


def split(name: str, network: nn.Module, num_classes: int) -> Split:
    """Cut the network; raises `UserError` where it has no last feature map or no linear classifier."""
    graphs = {mode: _Tracer().trace(network.train(mode)) for mode in (False, True)}
    graph, shapes = graphs[False], {}

    def read_shapes(blank, image):
        reader = _ShapeReader(blank, graph)
        reader.run(image)
        shapes.update(reader.shapes)

    size = probe(name, network, read_shapes)
    by_resolution = {
        shapes[node.name][2:]: node
        for node in _find_cuts(graph)
        if node.op != "placeholder" and _is_square_map(shapes.get(node.name, ()))
    }
    if not by_resolution:
        raise no_map(name, "it has no feature map that all of it passes through")
    *_, final = by_resolution.values()
    classifier = _check_head(name, network, graph, final, num_classes)
    stages = [node.name for node in by_resolution.values()]
    features, heads = {}, {}
    for mode, traced in graphs.items():
        features[mode] = _compile(network, _cut_features(traced, stages))
        heads[mode] = _compile(network, _cut_head(traced, final.name, classifier))
    return Split(
        features=lambda module, images: features[module.training](module, images),
        head=lambda module, activated: heads[module.training](module, activated),
        classifier=classifier,
        final_name=_describe(final),
        final=shapes[final.name][1:],
        image_size=size,
    )


def _find_cuts(graph: fx.Graph) -> list[fx.Node]:
    order = {node: position for position, node in enumerate(graph.nodes)}
    cuts, needed_until = [], -1  # the last position that reads a node before the current one
    for node, position in order.items():
        if needed_until <= position:
            cuts.append(node)
        if node.op != "get_attr":
            needed_until = max([needed_until, *(order[user] for user in node.users)])
    return cuts


def _is_square_map(shape: tuple[int, ...]) -> bool:
    # The blank image is square, so a map whose last two sides differ has its channels last.
    return len(shape) == 4 and shape[2] == shape[3] > 1


def _check_head(name: str, network: nn.Module, graph: fx.Graph, final: fx.Node, num_classes: int) -> str:
    """The classifier's name, if only pooling, normalisation and linear layers stand behind the final map."""
    nodes = list(graph.nodes)
    layers = {node.target: network.get_submodule(node.target) for node in nodes if node.op == "call_module"}
    behind = {node.target for node in nodes[nodes.index(final) + 1 :] if node.op == "call_module"}
    linear = [target for target in layers if target in behind and isinstance(layers[target], nn.Linear)]
    if not linear or layers[linear[-1]].out_features != num_classes:
        raise no_map(name, "its last layer is no linear classifier behind the last feature map")
    others = [target for target in layers if target in behind and not isinstance(layers[target], HEAD_LAYERS)]
    if others:
        raise no_map(name, f"{others[0]} ({type(layers[others[0]]).__name__}) stands behind its last feature map")
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
