"""What the routes of a study's routers are worth, token by token: does a token's shift, or its router's choice, tell whether it
gains by the full path?

What the numbers are, and what they are not, says gpt2/routing.py; what is written where, scripts/describing.
"""

import pkgutil
from typing import TYPE_CHECKING

from gpt2 import routing
from gpt2.attention.router import RouterAttention
from scripts import describing

if TYPE_CHECKING:
    from lib.config import Config


def names(cfg: "Config") -> set[str]:
    if not issubclass(pkgutil.resolve_name(cfg.ATTENTION_CLASS), RouterAttention):
        return set()
    return {f"routing/layer{layer}/{metric}" for layer in range(cfg.GPT2_N_LAYER) for metric in routing.METRICS}


def about(found: dict) -> list[str]:
    return [*describing.windows_said(found), "Means over layers. rho_shift: rank correlation over tokens of the benefit of the "
            "full path and the router's first feature; rho_p_full: of that benefit and the router's choice."]


MEASURE = describing.Measure("routing", "routing", "What routes are worth", routing.METRICS, routing.measure, names, about,
                             absent="it has no router", first=1, beside_baseline=False)

if __name__ == "__main__":
    describing.run(MEASURE, __doc__)
