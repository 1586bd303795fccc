"""A complete, jit-compiled training step for JAX in one call, of optax parts."""

from optloss.adopt import carry_over as carry_over
from optloss.decays import cosine_decay as cosine_decay
from optloss.decays import cosine_decay_restarts as cosine_decay_restarts
from optloss.decays import exponential_decay as exponential_decay
from optloss.decays import inverse_time_decay as inverse_time_decay
from optloss.decays import linear_cosine_decay as linear_cosine_decay
from optloss.decays import natural_exp_decay as natural_exp_decay
from optloss.decays import noisy_linear_cosine_decay as noisy_linear_cosine_decay
from optloss.decays import piecewise_constant as piecewise_constant
from optloss.decays import polynomial_decay as polynomial_decay
from optloss.fast.packed_states import pack_state as pack_state
from optloss.fast.packed_states import unpack_state as unpack_state
from optloss.gradients import accumulate_gradients as accumulate_gradients
from optloss.histograms import Histogram as Histogram
from optloss.histograms import histogram as histogram
from optloss.loss_scale import dynamic_loss_scale as dynamic_loss_scale
from optloss.norms import global_norm as global_norm
from optloss.optimize import make_optimizer as make_optimizer
from optloss.optimize import optimize_loss as optimize_loss
from optloss.optimizers.registry import list_optimizers as list_optimizers
from optloss.optimizers.registry import register_optimizer as register_optimizer
from optloss.optimizers.tensorflow import OPTIMIZER_CLS_NAMES as OPTIMIZER_CLS_NAMES
from optloss.per_example import clip_per_example as clip_per_example
from optloss.rates import get_learning_rate as get_learning_rate
from optloss.rates import set_learning_rate as set_learning_rate
from optloss.summaries import OPTIMIZER_SUMMARIES as OPTIMIZER_SUMMARIES
from optloss.summaries import get_summaries as get_summaries
from optloss.train_op import StepOutput as StepOutput
from optloss.train_op import TrainOp as TrainOp
from optloss.train_op import TrainOpState as TrainOpState
from optloss.transforms.adagc import adagc as adagc
from optloss.transforms.adaptive_clipping import adaptive_clipping as adaptive_clipping
from optloss.transforms.agc import agc as agc
from optloss.transforms.autoclip import autoclip as autoclip
from optloss.transforms.clipping import clip_by_function as clip_by_function
from optloss.transforms.clipping import clip_by_global_norm as clip_by_global_norm
from optloss.transforms.learning_rate import (
    inject_learning_rate as inject_learning_rate,
)
from optloss.transforms.learning_rate import (
    scale_by_learning_rate as scale_by_learning_rate,
)
from optloss.transforms.multipliers import layerwise_decay as layerwise_decay
from optloss.transforms.multipliers import multiply_gradients as multiply_gradients
from optloss.transforms.noise import add_gradient_noise as add_gradient_noise
from optloss.transforms.nonfinite import skip_nonfinite as skip_nonfinite
from optloss.transforms.spikes import skip_spikes as skip_spikes
from optloss.transforms.zclip import zclip as zclip
from optloss.typing import UpdateContext as UpdateContext

__version__ = "0.1.0"

__all__ = [
    "OPTIMIZER_CLS_NAMES",
    "OPTIMIZER_SUMMARIES",
    "Histogram",
    "StepOutput",
    "TrainOp",
    "TrainOpState",
    "UpdateContext",
    "accumulate_gradients",
    "adagc",
    "adaptive_clipping",
    "add_gradient_noise",
    "agc",
    "autoclip",
    "carry_over",
    "clip_by_function",
    "clip_by_global_norm",
    "clip_per_example",
    "cosine_decay",
    "cosine_decay_restarts",
    "dynamic_loss_scale",
    "exponential_decay",
    "get_learning_rate",
    "get_summaries",
    "global_norm",
    "histogram",
    "inject_learning_rate",
    "inverse_time_decay",
    "layerwise_decay",
    "linear_cosine_decay",
    "list_optimizers",
    "make_optimizer",
    "multiply_gradients",
    "natural_exp_decay",
    "noisy_linear_cosine_decay",
    "optimize_loss",
    "pack_state",
    "piecewise_constant",
    "polynomial_decay",
    "register_optimizer",
    "scale_by_learning_rate",
    "set_learning_rate",
    "skip_nonfinite",
    "skip_spikes",
    "unpack_state",
    "zclip",
]


def __dir__() -> list[str]:
    """Return what there is to use, without the modules that it stands in."""
    return [*__all__, "__version__", "integrations", "optimizers", "typing"]
