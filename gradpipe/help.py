"""Help: under which topic each option stands, an example of each command, and how both are shown.

typer's own panels would load rich's tables each time and read `[default: …]` as markup:
these are click's plain sections, with headings in bold where the terminal has it.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

OTHER = "Other"
TOPICS: Mapping[str, tuple[str, ...]] = {  # options by flag, whatever the command
    "Samples": (
        *("dataset", "dataset-config", "split", "revision", "text-column"),
        *("num-samples", "seq-len", "max-windows", "seed", "task", "alpha-dataset"),
    ),
    "What is recommended": ("recipe",),
    "Which grid": ("study", "with-store"),
    "What is measured": (
        *("tasks", "latency", "statistics", "encoding"),
        *("l1", "l2", "activations", "scale"),
    ),
    "How much goes": (
        *("sparsity", "pattern", "mixed-patterns", "allocation", "allocation-score"),
    ),
    "Which weights go": ("method", "score", "alpha", "grad-norm", "group", "update", "curvature"),
    "Which layers": ("blocks", "include", "exclude", "layer"),
    "What it is compared with": ("base", "compare", "model"),
    "The machine": (
        *("device", "device-map", "dtype", "batch-size", "schedule"),
        *("scratch", "workers", "checkpoint-every", "cache"),
    ),
    "Several jobs": ("shard", "finalize", "rank-timeout"),
    "What is written": (
        *("html", "figures", "format", "json", "verbose", "dry-run", "keep"),
        *("overwrite", "allow-mismatch", "card", "push-to-hub", "private"),
    ),
}
EXAMPLES: Mapping[str, tuple[str, ...]] = {  # by the words that call a command
    "collect-grads": (
        "pipe collect-grads embedded store --dataset stdlib --seq-len 256",
        "pipe collect-grads meta-llama/Llama-2-7b-hf store --dry-run",
    ),
    "prune": (
        "pipe prune embedded store out --sparsity 0.5 --pattern 2:4",
        "pipe prune embedded store out --method wanda --allocation owl --sparsity 0.7",
    ),
    "eval": (
        "pipe eval out/s0.50 --dataset stdlib --seq-len 256",
        "pipe eval out/s0.50 out/2-4 --dataset stdlib --compare embedded --latency",
        "pipe eval out/s0.50 --schedule streamed --scratch scratch",
    ),
    "verify": ("pipe verify out/s0.50 --base embedded",),
    "mask export": ("pipe mask export out/s0.50 masks.safetensors",),
    "mask apply": ("pipe mask apply tuned masks.safetensors tuned-and-pruned",),
    "sweep": (
        "pipe sweep embedded store out --method wanda --method gblm --sparsity 0.5 --sparsity 0.7",
        "pipe sweep meta-llama/Llama-2-7b-hf store out --study main",
    ),
    "report": ("pipe report out store --html report.html",),
    "doctor": ("pipe doctor embedded",),
    "demo": ("pipe demo demo-out",),
    "store info": ("pipe store info store",),
    "store verify": ("pipe store verify store",),
    "store copy": (
        "pipe store copy store s3://bucket/store",
        "pipe store copy store hf://datasets/me/gradients --private",
    ),
    "store export": ("pipe store export store imatrix.gguf --format imatrix",),
    "store stats": ("pipe store stats store --layer mlp",),
    "store merge": ("pipe store merge store other-shards",),
    "store import-gblm": ("pipe store import-gblm embedded store --l1 l1.pth --l2 l2.pth",),
}


def topic_of(flag: str) -> str:
    """The topic that an option stands under, by its flag less the dashes."""
    return next((topic for topic, flags in TOPICS.items() if flag in flags), OTHER)


class Group(TyperGroup):
    """Commands. Flags that typer adds are off, not None, for which it would load pydantic."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does, which has added them only now."""
        for parameter in self.get_params(ctx):
            if parameter.default is None:
                parameter.default = False
        return super().parse_args(ctx, args)


class Command(TyperCommand):
    """A command whose help has a section for each topic, and examples."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then options by topic, in the table's order."""
        sections: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections[_section(parameter)].append(record)
        for title in ("Arguments", *TOPICS, OTHER):
            if sections[title]:
                with formatter.section(typer.style(title, bold=True)):
                    formatter.write_dl(sections[title])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Examples, each on its line however long."""
        words = ctx.command_path.removeprefix(ctx.find_root().command_path).strip()
        if examples := EXAMPLES.get(words, ()):
            title = "Example" if len(examples) == 1 else "Examples"
            with formatter.section(typer.style(title, bold=True)):
                for example in examples:
                    formatter.write(f"  $ {example}\n")


def _section(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    return topic_of(parameter.opts[0].removeprefix("--"))
