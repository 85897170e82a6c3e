"""dss_fast: few-step samplers for diffusion and flow models, learned per model and run in one fused pass a step."""

from .compare import compare
from .methods import handmade
from .names import find_solver, solver_names
from .sampling import sample
from .schedule import VP, DiscreteVP, Flow, Grid
from .searching import GaussNewton, Lion, SearchResult, fit, plan, search
from .solver import Solver
from .target import Target
from .version import __version__

__all__ = [
    "VP",
    "__version__",
    "DiscreteVP",
    "Flow",
    "GaussNewton",
    "Grid",
    "Lion",
    "SearchResult",
    "Solver",
    "Target",
    "compare",
    "find_solver",
    "fit",
    "handmade",
    "plan",
    "sample",
    "search",
    "solver_names",
]
