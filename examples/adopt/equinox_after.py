import equinox as eqx
import jax
import optax
from sklearn import datasets

import optloss

images, labels = datasets.load_digits(return_X_y=True)
model = eqx.nn.MLP(64, 10, width_size=64, depth=1, key=jax.random.key(0))
optim = optloss.make_optimizer(1e-2, "adam", clip_gradients=0.5, skip_nonfinite=True)
opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))


def loss_fn(model, images, labels):
    logits = jax.vmap(model)(images / 16)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@eqx.filter_jit
def train_step(model, opt_state, images, labels):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, images, labels)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = optim.update(grads, opt_state, params, value=loss)
    return eqx.apply_updates(model, updates), opt_state, loss


for _ in range(50):
    model, opt_state, loss = train_step(model, opt_state, images, labels)
print(f"loss {loss:.3f}", optloss.get_summaries(opt_state)["clipped_share"])
