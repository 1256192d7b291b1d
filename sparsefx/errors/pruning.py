"""Recipes that do not fit and pruning that cannot be done."""

from sparsefx.errors.base import SparseFXError


class NothingMatches(SparseFXError, ValueError):
    """A recipe key (glob) that matches no prunable parameter."""

    message = (
        "recipe key {key!r} matches no weight of {model}; prunable weights are, for example: "
        "{examples}. Correct the glob or remove the key"
    )


class InvalidPattern(SparseFXError, ValueError):
    """A sparsity pattern whose own numbers make no sense."""

    message = "{pattern} is not a sparsity pattern: {rule}. {remedy}"


class PatternDoesNotFit(SparseFXError, ValueError):
    """A pattern was asked for on a weight whose shape it cannot divide."""

    message = (
        "{pattern} does not fit {name} of shape {shape}: {rule}. "
        "Exclude the weight (a glob that maps to None) or choose another pattern"
    )


class InvalidRecipe(SparseFXError, ValueError):
    """A recipe, or a recipe file, that cannot be understood."""

    message = "recipe {where}: {rule}. {remedy}"


class NonFiniteWeight(SparseFXError, ValueError):
    """A weight that contains NaN or infinity."""

    message = (
        "weight {name} has {count} NaN or infinite values, whose magnitude cannot be ranked; "
        "repair or reload the checkpoint before pruning or compiling it"
    )


class InvalidAllocation(SparseFXError, ValueError):
    """A way to spread a budget over layers whose own numbers make no sense."""

    message = "{what} is no way to spread a budget over layers: {rule}. {remedy}"


class ImpossibleBudget(SparseFXError, ValueError):
    """A budget that no choice for the layers can meet."""

    message = "the budget cannot be met: {rule}. {remedy}"


class NonFiniteLoss(SparseFXError, ValueError):
    """A loss, asked for a layer's importance, that is NaN or infinite."""

    message = (
        "the loss is {loss} on batch {batch} with {name} perturbed by {epsilon}: look for bad "
        "inputs, or pass a smaller epsilon. The model is unchanged"
    )


class InvalidCriterion(SparseFXError, ValueError):
    """A pruning criterion whose own numbers make no sense."""

    message = "{criterion} is not a valid criterion: {rule}. Its defaults are a good start"


class SingularHessian(SparseFXError, ArithmeticError):
    """A Hessian X^T X that cannot be factorised, whatever the damping that was tried."""

    message = (
        "X^T X of the inputs of {name} has no Cholesky factor, even with {damp:g} times its mean "
        "diagonal added; pass more calibration data, or a larger damp"
    )


class InvalidOrder(SparseFXError, ValueError):
    """An order of channels that would change what the model computes."""

    message = (
        "the order is not one of the {channels} channels that {name} reads, or moves some out of "
        "the block in which they may change places; pass the order found for this very coupling"
    )


class NonFiniteMetric(SparseFXError, ValueError):
    """A metric that gives no number for the dense model, with which others are compared."""

    message = (
        "the metric of the dense {model} is {value}: it must be a finite number, lower for a "
        "better model; look for bad inputs or bad weights"
    )


class NoGradient(SparseFXError, RuntimeError):
    """A model whose loss cannot be differentiated with respect to its layers' outputs."""

    message = (
        "the loss has no gradient at the outputs of the layers: {rule}; "
        'pass Knapsack(objective="error"), which needs none'
    )
