"""Pictures of the docs: a module per family, and `PICTURES`, what `make diagrams` draws.

A picture is a function of Sources that gives a figure, or raises Waits where the results that it shows are not committed. Its
name is that of its files. Sizes, gates, counts and bytes come from models that are built, everything measured from
docs/results; of numbers only the name of the model's size is typed into a picture.
"""

import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from scripts.diagramming.sources import Sources

FAMILIES = {
    "attention": "folded_layout forward_pass rwr_concept",
    "mlp": "rmlp_folding rmlp_ablation_steps",
    "starts": "geometric_init gate_evolution",
    "architecture": "fused_architecture",
    "caches": "cache_compression quality_speed_tradeoff inference_speed",
    "speed": "evolution_timeline performance_comparison",
    "quality": "validation_quality router_validation_perplexity router_final_comparison router_gpu_memory lmeval_benchmarks",
}
PICTURES = {name: family for family, names in FAMILIES.items() for name in names.split()}


def draw(name: str, sources: "Sources") -> "Figure":
    """The picture of this name. Raises Waits (scripts/diagramming/sources.py) where its results are not there."""
    drawn: Callable = pkgutil.resolve_name(f"scripts.diagramming.{PICTURES[name]}:{name}")
    return drawn(sources)
