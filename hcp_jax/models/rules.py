"""Say of each parameter how it is cut, decayed and stored; each module declares its own.

A module lists in `RULES` what its parameters need, by their path inside the module. What it does
not list follows Flax's names: a `kernel` is a matrix with one input dim, anything else is a vector
that is whole on every device.
"""

from typing import NamedTuple


class Rule(NamedTuple):
    """What a parameter needs; dims are counted without the dim of layers.

    Attributes:
        tp: the dim that tp cuts; None if the parameter is whole on every tp device.
        inputs: number of leading dims that are inputs of a matrix, which Hugging Face's folders
            store last; None if the parameter is stored as it is.
        fsdp: whether FSDP cuts it; norms, biases and sinks are too small to be worth a collective.
        decay: whether weight decay applies.
        signal: whether its gradient is a signal whose sign alone counts: each step moves it by a
            fixed amount against the sign, apart from the optimizer.
        stacked: whether its first dim counts equal matrices, such as experts; `inputs` does not
            count it, and each is a tensor of its own in Hugging Face's folders.
    """

    tp: int | None = None
    inputs: int | None = None
    fsdp: bool = False
    decay: bool = False
    signal: bool = False
    stacked: bool = False


Rules = dict[tuple[str, ...], Rule]
"""Rules by path inside a module, such as `("q_proj", "kernel")`."""


def matrix(tp: int | None = None, inputs: int = 1) -> Rule:
    """Return the rule of the weights of a matrix product."""
    return Rule(tp, inputs, fsdp=True, decay=True)


def bias(tp: int | None = None) -> Rule:
    """Return the rule of a bias."""
    return Rule(tp, inputs=0)


def find(rules: Rules, path: tuple[str, ...]) -> Rule:
    """Return the rule of a parameter: the declared one, or the one that its name implies."""
    if path in rules:
        return rules[path]
    return {"kernel": matrix(), "bias": bias()}.get(path[-1], Rule())
