"""The shapes of what each registered op returns, for whoever traces it: the names and signatures of the reference."""

from collections.abc import Sequence

from torch import Tensor

__all__ = ["multistep_pull", "multistep_step_", "multistep_update", "multistep_update_backward"]


def multistep_step_(x: Tensor, output: Tensor, history: Tensor, weights: Tensor, index: Tensor, out: Tensor) -> None:
    """Nothing: the op writes into history and out."""


def multistep_update(
    x: Tensor, output: Tensor, history: Sequence[Tensor], weights: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """(x_{i+1}, y_i)."""
    return x.new_empty(x.shape), (history[0] if history else x).new_empty(x.shape)


def multistep_update_backward(
    grad_x_next: Tensor | None,
    grad_y: Tensor | None,
    x: Tensor,
    output: Tensor,
    history: Sequence[Tensor],
    weights: Tensor,
    step: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """The four gradients; those that are not needed are empty."""
    return (
        x.new_empty(x.shape if needs[0] else 0),
        output.new_empty(output.shape if needs[1] else 0),
        [y.new_empty(y.shape) for y in history] if needs[2] else [],
        weights.new_empty((x.shape[0], weights.shape[2]) if needs[3] else 0),
    )


def multistep_pull(adjoints: Tensor, weights: Tensor, index: Tensor, pair: bool = False) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_output)."""
    batch, _, *sample = adjoints.shape
    return adjoints.new_empty(batch, *sample), adjoints.new_empty(2 * batch if pair else batch, *sample)
