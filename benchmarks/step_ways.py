"""The ways to take a solver's step that bench_step.py compares: each builds a function of no arguments.

All compute x + dt * sum_j c_ij v_j, the step of a flow model, so that nobody pays for more than its own formula.
"""

from importlib.util import find_spec

import torch

from dss_fast.step import multistep_pull, multistep_step, multistep_update


class Setting:
    """Tensors of one cell of the table: state, N network outputs, coefficients, at the last of N steps."""

    def __init__(self, shape, steps, dtypes, pair=False, device="cpu", scale=1.5):
        state, network = dtypes
        self.shape, self.steps, self.pair, self.scale = shape, steps, pair, scale
        self.x = torch.randn(shape, device=device, dtype=state)
        rows = (2 * shape[0], *shape[1:]) if pair else shape
        self.outputs = [torch.randn(rows, device=device, dtype=network) for _ in range(steps)]
        self.history = torch.randn(shape[0], steps, *shape[1:], device=device, dtype=network)
        coeffs = torch.rand(steps, steps, device=device).tril() + 0.1
        self.coeffs = coeffs.tril() / coeffs.tril().sum(1, keepdim=True)
        self.timedeltas = torch.full((steps,), 1 / steps, device=device)
        head = torch.tensor([1.0, 0, 1, scale], device=device).expand(steps, 4)
        self.weights = torch.cat([head, self.coeffs * self.timedeltas[:, None]], 1)[None].contiguous()
        self.index = torch.arange(steps, device=device)
        self.out = torch.empty_like(self.x)

    def bytes(self, backward=False):
        """What the fused step must move: at the last step N - 1 past slots are read and one is written."""
        n, state, network = self.x.numel(), self.x.element_size(), self.history.element_size()
        forward = n * (2 * state + (1 + self.pair) * network + self.steps * network)
        if not backward:
            return forward
        reads = n * (2 * state + (1 + self.pair) * network + (self.steps - 1) * network)
        return forward + reads + n * (state + (1 + self.pair) * network + self.steps * network)

    def pull_bytes(self):
        """All N adjoints are read, the gradients of the state and of the output written."""
        return self.x.numel() * self.x.element_size() * (self.steps + 2)

    def loop_bytes(self):
        n, state, network = self.x.numel(), self.x.element_size(), self.history.element_size()
        return sum(n * (2 * state + (1 + self.pair) * network + (i + 1) * network) for i in range(self.steps))


def combine(output, pair, scale):
    if not pair:
        return output
    uncond, cond = output.chunk(2)
    return uncond + scale * (cond - uncond)


def released_step(x, output, trajectory, coeffs, dt, i, pair, scale):
    """As the released samplers write it: a Python list, 0-dim coefficients, one product and one sum at a time."""
    trajectory = [*trajectory, combine(output, pair, scale)]
    pred = 0
    for j in range(i + 1):
        pred = pred + coeffs[i][j] * trajectory[j]
    return x + dt * pred, trajectory


def stacked_step(x, output, history, row, i, pair, scale):
    """By hand: the history in one tensor, written in place, and one matrix-vector product."""
    history[:, i] = combine(output, pair, scale)
    past = history[:, : i + 1].flatten(2)
    if len(past) == 1 and past.dtype == x.dtype:
        return torch.addmv(x.flatten(), past[0].t(), row[: i + 1]).view_as(x)
    return x + torch.einsum("k,bkd->bd", row[: i + 1].to(past.dtype), past).view_as(x)


def ours(s):
    i = s.steps - 1
    return lambda: multistep_step(s.x, s.outputs[i], s.history, s.weights, s.index[i : i + 1], out=s.out)


def ours_list(s):
    i = s.steps - 1
    past = [s.history[:, j].contiguous() for j in range(i)]
    return lambda: multistep_update(s.x, s.outputs[i], past, s.weights, i)


def released(s):
    i = s.steps - 1
    past = [s.history[:, j].contiguous() for j in range(i)]
    return lambda: released_step(s.x, s.outputs[i], past, s.coeffs, s.timedeltas[i], i, s.pair, s.scale)[0]


def stacked(s):
    i = s.steps - 1
    row = (s.coeffs[i] * s.timedeltas[i]).contiguous()
    return lambda: stacked_step(s.x, s.outputs[i], s.history, row, i, s.pair, s.scale)


def released_compiled(s):
    i = s.steps - 1
    past = [s.history[:, j].contiguous() for j in range(i)]

    @torch.compile(fullgraph=True, dynamic=False)
    def step(x, output, past, coeffs, dt):
        return released_step(x, output, past, coeffs, dt, i, s.pair, s.scale)[0]

    return lambda: step(s.x, s.outputs[i], past, s.coeffs, s.timedeltas[i])


def stacked_compiled(s):
    i = s.steps - 1
    row = (s.coeffs[i] * s.timedeltas[i]).contiguous()

    @torch.compile(fullgraph=True, dynamic=False)
    def step(x, output, history, row):
        history[:, i] = combine(output, s.pair, s.scale)
        weighted = row[: i + 1].view(1, -1, *[1] * (x.dim() - 1)) * history[:, : i + 1]
        return x + weighted.sum(1)

    return lambda: step(s.x, s.outputs[i], s.history, row)


def copy(bytes_moved, device):
    """A plain copy that reads and writes as many bytes in all."""
    a = torch.ones(bytes_moved // 2, dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    return lambda: b.copy_(a)


LAST_STEP = {
    "ours": ours,
    "ours list": ours_list,
    "released eager": released,
    "stacked eager": stacked,
    "released compiled": released_compiled,
    "stacked compiled": stacked_compiled,
}


def ours_loop(s):
    def run():
        x = s.x
        for i in range(s.steps):
            multistep_step(x, s.outputs[i], s.history, s.weights, s.index[i : i + 1], out=s.out)
            x = s.out

    return run


def released_loop(s):
    def run():
        x, trajectory = s.x, []
        for i in range(s.steps):
            x, trajectory = released_step(x, s.outputs[i], trajectory, s.coeffs, s.timedeltas[i], i, s.pair, s.scale)

    return run


def stacked_loop(s):
    rows = (s.coeffs * s.timedeltas[:, None]).contiguous()

    def run():
        x = s.x
        for i in range(s.steps):
            x = stacked_step(x, s.outputs[i], s.history, rows[i], i, s.pair, s.scale)

    return run


def diffusers_loop(name):
    def build(s):
        import diffusers

        scheduler = getattr(diffusers, name)(
            **({} if name.startswith("Flow") else {"prediction_type": "flow_prediction", "use_flow_sigmas": True})
        )

        def run():
            scheduler.set_timesteps(s.steps, device=s.x.device)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)
            x = s.x
            for i, t in enumerate(scheduler.timesteps):
                output = combine(s.outputs[i], s.pair, s.scale)
                x = scheduler.step(output, t, x, return_dict=False)[0]

        def setting_up():
            scheduler.set_timesteps(s.steps, device=s.x.device)

        run.without = setting_up  # its time is taken off: we compare steps
        return run

    return build


LOOP = {"ours": ours_loop, "released eager": released_loop, "stacked eager": stacked_loop}
if find_spec("diffusers"):
    LOOP |= {
        "diffusers DPM++ 2M": diffusers_loop("DPMSolverMultistepScheduler"),
        "diffusers UniPC": diffusers_loop("UniPCMultistepScheduler"),
        "diffusers FlowMatchEuler": diffusers_loop("FlowMatchEulerDiscreteScheduler"),
    }


def _leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def ours_gradient(s):
    i = s.steps - 1
    leaves = _leaves(s.x, s.outputs[i], s.weights, *(s.history[:, j].contiguous() for j in range(i)))
    x, output, weights, *past = leaves
    grad = torch.ones_like(s.x)
    return lambda: torch.autograd.grad(multistep_update(x, output, past, weights, i)[0], leaves, grad)


def released_gradient(s, compiled=False):
    i = s.steps - 1
    leaves = _leaves(s.x, s.outputs[i], s.coeffs, s.timedeltas, *(s.history[:, j] for j in range(i)))
    grad = torch.ones_like(s.x)

    def step(x, output, coeffs, timedeltas, *past):
        return released_step(x, output, past, coeffs, timedeltas[i], i, s.pair, s.scale)[0]

    step = torch.compile(step, fullgraph=True, dynamic=False) if compiled else step
    return lambda: torch.autograd.grad(step(*leaves), leaves, grad)


def stacked_gradient(s, compiled=False):
    i = s.steps - 1
    leaves = _leaves(s.x, s.outputs[i], s.history[:, :i], s.weights[0, i, 4:])
    grad = torch.ones_like(s.x)

    def step(x, output, past, row):
        history = torch.cat([past, combine(output, s.pair, s.scale)[:, None]], 1).flatten(2)
        if compiled:
            return x + (row.view(1, -1, 1) * history).sum(1).view_as(x).to(x.dtype)
        return x + torch.einsum("k,bkd->bd", row.to(history.dtype), history).view_as(x)

    step = torch.compile(step, fullgraph=True, dynamic=False) if compiled else step
    return lambda: torch.autograd.grad(step(*leaves), leaves, grad)


GRADIENT = {
    "ours": ours_gradient,
    "released eager": released_gradient,
    "stacked eager": stacked_gradient,
    "released compiled": lambda s: released_gradient(s, True),
    "stacked compiled": lambda s: stacked_gradient(s, True),
}


def ours_pull(s):
    return lambda: multistep_pull(s.history, s.weights, s.index[:1])


def released_pull(s, compiled=False):
    """What autograd does with the released list: a product and a sum for each later step; the state's is passed on."""
    adjoints = [s.history[:, i].contiguous() for i in range(s.steps)]

    def pull(adjoints, coeffs, timedeltas):
        pulled = 0
        for i, adjoint in enumerate(adjoints):
            pulled = pulled + coeffs[i][0] * timedeltas[i] * adjoint
        return pulled

    pull = torch.compile(pull, fullgraph=True, dynamic=False) if compiled else pull
    return lambda: pull(adjoints, s.coeffs, s.timedeltas)


def stacked_pull(s, compiled=False):
    column = (s.coeffs[:, 0] * s.timedeltas).contiguous()

    def pull(adjoints, column):
        if compiled:
            return (column.view(1, -1, *[1] * (adjoints.dim() - 2)) * adjoints).sum(1)
        return torch.einsum("k,bkd->bd", column, adjoints.flatten(2))

    pull = torch.compile(pull, fullgraph=True, dynamic=False) if compiled else pull
    return lambda: pull(s.history, column)


PULL = {
    "ours": ours_pull,
    "released eager": released_pull,
    "stacked eager": stacked_pull,
    "released compiled": lambda s: released_pull(s, True),
    "stacked compiled": lambda s: stacked_pull(s, True),
}
