import optax
from flax import nnx
from sklearn import datasets

import optloss

images, labels = datasets.load_digits(return_X_y=True)
rngs = nnx.Rngs(0)
model = nnx.Sequential(
    nnx.Linear(64, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 10, rngs=rngs)
)
tx = optloss.make_optimizer(1e-2, "adam", clip_gradients=0.5, skip_nonfinite=True)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


def loss_fn(model, images, labels):
    logits = model(images / 16)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)
    optimizer.update(model, grads, value=loss)
    return loss


for _ in range(50):
    loss = train_step(model, optimizer, images, labels)
print(f"loss {loss:.3f}", optloss.get_summaries(optimizer)["clipped_share"])
