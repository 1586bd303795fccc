import jax
import optax
from flax import linen as nn
from sklearn import datasets

import optloss
from optloss.integrations.linen import TrainState

images, labels = datasets.load_digits(return_X_y=True)
model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])

state = TrainState.create(
    apply_fn=model.apply,
    params=model.init(jax.random.key(0), images[:1] / 16)["params"],
    tx=optloss.make_optimizer(1e-2, "adam", clip_gradients=0.5, skip_nonfinite=True),
)


@jax.jit
def train_step(state, images, labels):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images / 16)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads, extra={"value": loss}), loss


for _ in range(50):
    state, loss = train_step(state, images, labels)
print(f"loss {loss:.3f}", optloss.get_summaries(state)["clipped_share"])
