"""Function classes of a study's steps: which of them compute the same functions, so that a difference is optimisation only.

What a configuration's class is, is the model's to say (the symbol FUNCTION_CLASS names the function that does); here steps are
only told apart by it, and named after the first of their class. Needs no torch.
"""

import pkgutil
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FunctionClass:
    """The class of one step: `of` is the first step of it. `relation` is "equal", "inside" for a restriction of it, or "own"
    for the step that a class is named after, also a restriction of a class that no step here is."""

    step: str
    of: str
    relation: str

    def __str__(self) -> Any:
        """For a column of a table."""
        return f"inside {self.of}" if self.relation == "inside" else self.of

    @property
    def sentence(self) -> str | None:
        """For a report; None of a step that names its class."""
        return {"equal": f"{self.step} is {self.of} in function class: a difference is optimisation only",
                "inside": f"{self.step} is a restriction of {self.of}, which can compute whatever {self.step} can"}.get(
                    self.relation)


def function_classes(configurations: dict[str, Any]) -> dict[str, FunctionClass]:
    """The class of every step of {step: resolved configuration}."""
    keys = {step: pkgutil.resolve_name(cfg.FUNCTION_CLASS)(cfg) for step, cfg in configurations.items()}
    first: dict[tuple, str] = {}
    for step, (key, relation) in keys.items():
        if relation == "equal":
            first.setdefault(key, step)
    of = {step: first.get(key, step) for step, (key, _) in keys.items()}
    return {step: FunctionClass(step, of[step], "own" if of[step] == step else relation)
            for step, (_, relation) in keys.items()}
