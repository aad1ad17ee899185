"""Draw how fast attention kernels are."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from hcp_jax.viz import style


def draw_rates(
    names: Sequence[str], forward: Sequence[float], backward: Sequence[float], title: str = ""
) -> Figure:
    """Draw a pair of bars, forward and backward, for each kernel.

    Args:
        names: names of the kernels.
        forward: TFLOP/s of each in the forward pass.
        backward: TFLOP/s of each in the backward pass.
        title: title of the picture.

    >>> draw_rates(["triton", "cudnn"], [300, 400], [250, 330]).axes[0].get_ylabel()
    'TFLOP/s'
    """
    figure = style.figure(max(4, 1.1 * len(names)), 4)
    axes = figure.subplots()
    for offset, label, rates, colour in (
        (-0.2, "forward", forward, style.BLUE),
        (0.2, "backward", backward, style.YELLOW_ORANGE),
    ):
        axes.bar([i + offset for i in range(len(names))], rates, 0.4, label=label, color=colour)
    style.finish(axes, "", "TFLOP/s")
    axes.set_xticks(range(len(names)), names)
    axes.set_title(title)
    axes.legend(frameon=False)
    return figure
