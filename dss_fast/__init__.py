"""dss_fast: few-step samplers for diffusion and flow models, learned per model and run in one fused pass a step."""

from .compare import compare
from .methods import handmade
from .names import find_solver, solver_names
from .sampling import sample
from .schedule import VP, DiscreteVP, Flow, Grid
from .search import search
from .solver import Solver
from .target import Target

__all__ = [
    "VP",
    "DiscreteVP",
    "Flow",
    "Grid",
    "Solver",
    "Target",
    "compare",
    "find_solver",
    "handmade",
    "sample",
    "search",
    "solver_names",
]
__version__ = "0.2.0"
