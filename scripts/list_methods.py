"""The methods as a Markdown table, made from what each of them says of itself: `python scripts/list_methods.py`.

The first column holds the flags that the recipe table fills in for the teacher, the student and the data set.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distiller_zoo import DISTILLERS, Distiller
from errors import run_script
from helper.command_line import Parser
from helper.recipes import recipe_of
from helper.tables.pages import markdown_table

HEAD = ("`--distill` and its recipe", "what it is", "source", "needs", "ships")


def describe_needs(method: type[Distiller]) -> str:
    """What a method asks of networks and data, in words."""
    needs = ["logits" if method.reads_teacher else "labels", *method.reads]
    sides = [side for side in ("student", "teacher") if getattr(method, f"{side}_preact")]
    needs += [f"pre-activations ({' and '.join(sides)})"] if sides else []
    needs += [] if method.views == "plain" else [f"views: {method.views.replace('_', ' and ')}"]
    needs += ["a stage before the main one"] if _has_first_stage(method) else []
    needs += [] if method.reads_teacher else ["no teacher"]
    return ", ".join(needs)


def _has_first_stage(method: type[Distiller]) -> bool:
    return any(flag.argument == "init_epochs" for flag in method.flags)


def describe_recipe(method: type[Distiller], dataset: str, teacher: str, student: str) -> str:
    """The command line that asks for the method and says what the recipe would say."""
    recipe = recipe_of(dataset, teacher, student, method.name)
    parts = [f"--distill {method.name}"]
    for flag in method.flags:
        value = recipe.get(flag.argument, (flag.default, ""))[0]
        if flag.is_weight or flag.argument in recipe:
            parts.append(flag.written(value))
    return f"`{' '.join(filter(None, parts))}`"


def table(dataset: str, teacher: str, student: str) -> str:
    """All methods, by group."""
    rows: list[Sequence[str]] = [HEAD]
    for group in dict.fromkeys(method.group for method in DISTILLERS.values()):
        rows.append((f"**{group}**", *[""] * (len(HEAD) - 1)))
        for method in DISTILLERS.values():
            if method.group == group:
                recipe = describe_recipe(method, dataset, teacher, student)
                rows.append((recipe, method.summary, method.source, describe_needs(method), method.ships))
    return markdown_table(rows)


def main(argv=None) -> None:
    parser = Parser.of_script(__doc__)
    parser.add_argument("--dataset", default="cifar100")
    parser.add_argument("--model_t", default="resnet32x4")
    parser.add_argument("--model_s", default="resnet8x4")
    args = parser.parse_args(argv)
    print(table(args.dataset, args.model_t, args.model_s))


if __name__ == "__main__":
    run_script(main)
