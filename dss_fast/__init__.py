"""dss_fast: few-step samplers for diffusion and flow models, learned per model and run in one fused pass a step."""

from .handmade import handmade
from .sampling import sample
from .schedule import VP, DiscreteVP, Flow
from .search import search
from .solver import Solver

__all__ = ["VP", "DiscreteVP", "Flow", "Solver", "handmade", "sample", "search"]
__version__ = "0.1.0"
